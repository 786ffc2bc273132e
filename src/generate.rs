//! `generate` and `domains`: problems, and what there is to choose from.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use domains::{Exam, domain, exam, exam_specs, registry};

use crate::report::print;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Domain of `autodidact domains`.
    #[arg(long, required_unless_present = "exam")]
    domain: Option<String>,
    /// Level of its ladder.
    #[arg(long, default_value_t = 1)]
    level: u32,
    /// How many problems.
    #[arg(long, default_value_t = 10)]
    count: u64,
    /// Seed of the ladder.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Rebuild an exam, and compare it with the committed one.
    #[arg(long, conflicts_with_all = ["domain", "level", "count", "seed"])]
    exam: Option<String>,
    /// Where to write the rebuilt exam's file, such as `programs-induction.jsonl.zst`; keys, where it has them, go beside it.
    #[arg(long, requires = "exam", value_name = "FILE")]
    out: Option<PathBuf>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    if let Some(name) = &args.exam {
        return rebuild_exam(name, args.out.as_ref());
    }
    let domain = domain(args.domain.as_deref().unwrap_or_default())?;
    let levels = domain.ladder_levels();
    let known = || levels.iter().map(|level| level.level.to_string()).collect::<Vec<_>>().join(", ");
    levels
        .iter()
        .find(|level| level.level == args.level)
        .with_context(|| format!("level: expected one of {} for {}, got {}", known(), domain.name(), args.level))?;
    for index in 0..args.count {
        let problem = domain.ladder(args.level, args.seed, index).problem;
        print(&domain.problem_to_json(&problem)?.to_string())?;
    }
    Ok(())
}

fn rebuild_exam(name: &str, out: Option<&PathBuf>) -> Result<()> {
    let committed = exam(name)?;
    let spec = exam_specs().into_iter().find(|spec| spec.name == name).context("every exam has a spec")?;
    let rebuilt = Exam::generate(spec)?;
    if let Some(path) = out {
        let write = |path: &Path, bytes: &[u8]| {
            std::fs::write(path, bytes).with_context(|| format!("write {}", path.display()))
        };
        write(path, &rebuilt.to_file()?)?;
        if let Some(keys) = domain(spec.domain)?.exam_keys_file(spec, &rebuilt) {
            let text = path.display().to_string();
            let path = PathBuf::from(format!("{}.keys.zst", text.strip_suffix(".jsonl.zst").unwrap_or(&text)));
            write(&path, &keys)?;
            print(&format!("keys: {}\n", path.display()))?;
        }
    }
    let agrees = if rebuilt == *committed { "is the committed exam" } else { "differs from the committed exam" };
    print(&format!(
        "{name}: {} dev and {} test problems, digest {}: {agrees}\n",
        rebuilt.dev.len(),
        rebuilt.test.len(),
        rebuilt.digest()
    ))
}

pub(crate) fn print_domains() -> Result<()> {
    for domain in registry() {
        print(&format!("{}: {}\n", domain.name(), domain.description()))?;
        for level in domain.ladder_levels() {
            print(&format!("  level {}  {}\n", level.level, level.description))?;
        }
        for spec in domain.exam_specs() {
            let exam = exam(spec.name)?;
            print(&format!(
                "  exam {}  {} dev, {} test, like level {}, digest {}\n",
                spec.name,
                exam.dev.len(),
                exam.test.len(),
                spec.level,
                exam.digest().short()
            ))?;
        }
    }
    Ok(())
}
