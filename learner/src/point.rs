//! The place of a checkpoint in the journal, and what a run needs from the records before it.

use serde::{Deserialize, Serialize};

use crate::audit::Trained;
use crate::journal::{GroupRecord, Known, Place};

/// A place in the journal, and all that a run needs from the records before it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Point {
    /// The last record before it; absent at the beginning of the journal.
    pub(crate) place: Option<Place>,
    pub(crate) known: Known,
    /// How many groups of each actor were trained on, and in which steps.
    pub(crate) trained: Trained,
    /// Groups that are not folded yet, in order of arrival.
    pub(crate) received: Vec<GroupRecord>,
}
