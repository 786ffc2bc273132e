//! Progress of a download, on standard error: a bar on a terminal, otherwise a line for every tenth.

use std::io::IsTerminal as _;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::report::{bytes, note};

pub(crate) struct Meter {
    name: String,
    size_bytes: u64,
    bar: Option<ProgressBar>,
    /// Tenths that have a line.
    num_tenths: u64,
}

impl Meter {
    pub(crate) fn new(name: String, size_bytes: u64) -> Meter {
        // A terminal that cannot move its cursor would show every state of the bar.
        let is_dumb = std::env::var_os("TERM").is_none_or(|terminal| terminal == "dumb");
        let is_shown = std::io::stderr().is_terminal() && !is_dumb;
        let bar = is_shown.then(|| bar(name.clone(), size_bytes));
        Meter { name, size_bytes, bar, num_tenths: 0 }
    }

    /// Shows the number of bytes that are there at the beginning of a download.
    pub(crate) fn begin(&mut self, num_bytes: u64) {
        self.num_tenths = self.tenths(num_bytes);
        if let Some(bar) = &self.bar {
            bar.set_position(num_bytes);
            bar.reset_eta();
        }
    }

    /// Shows the number of bytes that are there.
    pub(crate) fn set(&mut self, num_bytes: u64) {
        let num_tenths = self.tenths(num_bytes);
        match &self.bar {
            Some(bar) => bar.set_position(num_bytes),
            None if num_tenths > self.num_tenths => {
                note(format_args!("{}: {} % of {}", self.name, 10 * num_tenths, bytes(self.size_bytes)));
            }
            None => {}
        }
        self.num_tenths = num_tenths;
    }

    /// Prints a line without disturbing the bar.
    pub(crate) fn note(&self, line: std::fmt::Arguments<'_>) {
        match &self.bar {
            Some(bar) => bar.suspend(|| note(line)),
            None => note(line),
        }
    }

    /// Removes the bar.
    pub(crate) fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    fn tenths(&self, num_bytes: u64) -> u64 {
        10 * num_bytes / self.size_bytes.max(1)
    }
}

fn bar(name: String, size_bytes: u64) -> ProgressBar {
    let template = "{msg} [{wide_bar}] {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";
    let style = ProgressStyle::with_template(template).expect("a template of known keys").progress_chars("=> ");
    ProgressBar::with_draw_target(Some(size_bytes), ProgressDrawTarget::stderr()).with_style(style).with_message(name)
}
