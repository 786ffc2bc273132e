use proto::{KeyedProblem, Niche, Problem};

use crate::{Checker, Error, Judged, Ladder};

/// A proposal that was read: the problem, or the verdict on what is none and why.
pub type Admission = Result<KeyedProblem, Judged>;

/// Requests for problems in words, for models that read text.
///
/// A niche that belongs to no level of the ladder is [`Error::Problem`].
pub trait Proposing: Send + Sync {
    /// Asks for a problem of a niche, in the notation that [`Checker::admit`] reads. What all requests of a level have in common
    /// comes first: networks read the shared beginning of prompts once.
    ///
    /// # Errors
    /// [`Error::Problem`].
    fn request(&self, niche: Niche) -> Result<String, Error>;

    /// Lists worked examples: niches of the same level, each with a proposal for it. They depend on the niche alone, and none is
    /// in an exam.
    ///
    /// # Errors
    /// [`Error::Problem`].
    fn examples(&self, niche: Niche) -> Result<Vec<(Niche, String)>, Error>;

    /// Returns a regular expression that a well-formed proposal matches from its first character to its last, for constrained
    /// decoding. It bounds the length, and is the same for all niches of a level: a proposal of another niche than was asked for
    /// becomes an example of its own.
    ///
    /// # Errors
    /// [`Error::Problem`].
    fn pattern(&self, niche: Niche) -> Result<String, Error>;
}

/// Draws problems of the level of a niche as proposals, each with its own niche: a function of the niche. The first one shows the
/// notation, the others are worked examples.
///
/// - `notation`: writes a problem as a proposal. Problems that would not be admitted are left out.
///
/// # Errors
/// [`Error::Problem`] when the niche belongs to no level.
pub(crate) fn drawn(
    domain: &(impl Ladder + Checker),
    niche: Niche,
    notation: impl Fn(&Problem) -> &str,
) -> Result<Vec<(Niche, String)>, Error> {
    drawn_as(domain, niche, |level, seed, index| {
        let keyed = domain.ladder(level, seed, index);
        let proposal = notation(&keyed.problem).to_owned();
        (keyed, proposal)
    })
}

/// Draws as [`drawn`] does.
///
/// - `draw`: draws a problem, given level, seed and index, with its proposal.
///
/// # Errors
/// As of [`drawn`].
pub(crate) fn drawn_as(
    domain: &(impl Ladder + Checker),
    niche: Niche,
    draw: impl Fn(u32, u64, u64) -> (KeyedProblem, String),
) -> Result<Vec<(Niche, String)>, Error> {
    let level = expect_level(domain, niche)?;
    let first = niche.0.wrapping_mul(NUM_DRAWN as u64);
    let mut drawn = Vec::with_capacity(NUM_DRAWN);
    for index in 0.. {
        let (KeyedProblem { problem, key }, proposal) = draw(level, SEED, first.wrapping_add(index));
        if domain.admit(niche, &proposal)?.is_ok() {
            drawn.push((domain.niche(&problem, key.as_ref())?, proposal));
        }
        if drawn.len() == NUM_DRAWN {
            break;
        }
    }
    Ok(drawn)
}

/// Returns the level of a niche.
///
/// # Errors
/// [`Error::Problem`] when the niche belongs to no level.
pub(crate) fn expect_level(domain: &impl Ladder, niche: Niche) -> Result<u32, Error> {
    let level = domain.level_of(niche);
    let refusal = || Error::Problem {
        domain: domain.name(),
        expected: "a niche of a level of the ladder".to_owned(),
        got: format!("niche {niche}"),
    };
    (level > 0).then_some(level).ok_or_else(refusal)
}

/// One to show the notation, and as many worked examples as a config may ask for.
const NUM_DRAWN: usize = 4;

/// The seed of these draws. Seeds of runs are smaller.
const SEED: u64 = u64::MAX;
