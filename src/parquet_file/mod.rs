//! Parquet files: tables of problems to read.

mod bounds;
mod read;

pub(crate) use self::read::{is_parquet, records};
