//! Parquet files: tables of problems to read, and of training data to write.

mod bounds;
mod read;
mod write;

pub(crate) use self::read::{is_parquet, records};
pub(crate) use self::write::{Cell, TableWriter};
