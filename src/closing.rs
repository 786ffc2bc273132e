//! The report that `train` prints when it stops.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::Result;
use domains::Split;
use learner::{EvalRecord, Outcome, Summary};

use crate::baselines;
use crate::plan::Plan;
use crate::report::{bytes, clock, count, folder_bytes, percent, quoted_path, table, word};

/// A run that stopped.
#[derive(Clone, Copy)]
pub(crate) struct Closing<'a> {
    pub(crate) plan: &'a Plan,
    pub(crate) summary: &'a Summary,
    /// CPU time of the run, including earlier processes.
    pub(crate) cpu_time: Duration,
}

/// Scores on an exam without any learning, as shares of right answers.
#[derive(serde::Serialize)]
struct Baselines {
    uniform_legal: f64,
    enumeration_1_call: f64,
}

impl Closing<'_> {
    /// Returns the report as text for people.
    pub(crate) fn text(&self) -> Result<String> {
        let Closing { plan, summary, cpu_time } = *self;
        let run_dir = quoted_path(&plan.run_dir);
        let mut text = String::from("\n");
        if summary.outcome == Outcome::Interrupted {
            text += &self.exam_table()?;
            text += &format!(
                "\nstopped at step {} after {} ({} of CPU time); resume with: {}\n",
                summary.step,
                clock(summary.elapsed),
                clock(cpu_time),
                plan.go_on()
            );
            return Ok(text);
        }
        text += &format!(
            "{} steps in {} ({} of CPU time): {} answers, {} of them correct, {} tokens trained on\n\n",
            summary.step,
            clock(summary.elapsed),
            clock(cpu_time),
            count(summary.totals.num_rollouts as f64),
            count(summary.totals.num_correct as f64),
            count(summary.totals.num_trained_tokens as f64),
        );
        text += &self.exam_table()?;
        let mut cells = summary.totals.trained_by_origin.clone();
        cells.sort_by(|left, right| right.2.total_cmp(&left.2));
        let total: f64 = cells.iter().map(|cell| cell.2).sum();
        if total > 0.0 {
            text += "\norigins of the trained tokens\n";
        }
        for (problem_origin, label_origin, weighted) in &cells {
            let (problem, label) = (word(problem_origin), word(label_origin));
            text += &format!("  problem: {problem}, label: {label}  {}\n", percent(weighted / total));
        }
        text += &format!(
            "\njournal {}, weights {}\n",
            bytes(folder_bytes(&plan.run_dir.join("journal"))),
            summary.weights_digest.short()
        );
        if summary.num_audited > 0 || !summary.banned.is_empty() {
            let banned = if summary.banned.is_empty() { "none".to_owned() } else { summary.banned.join(", ") };
            text += &format!("audits: two actors agreed on {} tasks; banned: {banned}\n", summary.num_audited);
        }
        if let Some(control) = summary.control {
            let comes_out_the_same = plan.manifest.reproducible && !plan.config.run.is_free_running();
            let what = if comes_out_the_same { "reproduce the weights" } else { "rerun the config" };
            text += &format!("{what} with: {}\n", plan.again(control));
        }
        text += &format!("test exams: autodidact eval {run_dir}\ncurves: {run_dir}/curves.svg\n");
        Ok(text)
    }

    fn exam_table(&self) -> Result<String> {
        let summary = self.summary;
        if summary.evals.is_empty() {
            return Ok(String::new());
        }
        let mut rows = vec![["dev exam", "before", "after", "random legal", "enumeration"].map(str::to_owned).to_vec()];
        let baselines = self.baselines()?;
        if baselines.is_empty() {
            rows[0].truncate(3);
        }
        for name in self.exams() {
            let mut of_exam: Vec<_> = summary.evals.iter().filter(|eval| eval.exam == name).collect();
            of_exam.sort_by_key(|eval| eval.step);
            let share = |eval: Option<&&EvalRecord>| {
                eval.map_or("-".to_owned(), |eval| percent(eval.num_correct as f64 / eval.num_problems as f64))
            };
            let mut row = vec![name.to_owned(), share(of_exam.first()), share(of_exam.last())];
            if let Some(Baselines { uniform_legal, enumeration_1_call }) = baselines.get(name) {
                row.extend([*uniform_legal, *enumeration_1_call].map(percent));
            }
            rows.push(row);
        }
        Ok(table(&rows))
    }

    /// Returns the same report as JSON.
    pub(crate) fn json(&self) -> Result<serde_json::Value> {
        let Closing { plan, summary, cpu_time } = *self;
        Ok(serde_json::json!({
            "run_dir": plan.run_dir,
            "outcome": if summary.outcome == Outcome::Finished { "finished" } else { "interrupted" },
            "step": summary.step,
            "weights_digest": summary.weights_digest,
            "control": summary.control,
            "elapsed_s": summary.elapsed.as_secs_f64(),
            "cpu_s": cpu_time.as_secs_f64(),
            "evals": summary.evals,
            "baselines": self.baselines()?,
            "totals": summary.totals,
            "num_reissued": summary.num_reissued,
            "num_duplicates": summary.num_duplicates,
            "num_audited": summary.num_audited,
            "banned": summary.banned,
            "num_refused": summary.num_refused,
            "num_stale": summary.num_stale,
            "journal_bytes": folder_bytes(&plan.run_dir.join("journal")),
            // Commands: `again` runs the same config again, `go_on` resumes the run.
            "again": summary.control.filter(|_| summary.outcome == Outcome::Finished).map(|control| plan.again(control)),
            "go_on": (summary.outcome == Outcome::Interrupted).then(|| plan.go_on()),
        }))
    }

    /// Returns the names of the exams that the run sat, in order.
    fn exams(&self) -> BTreeSet<&str> {
        self.summary.evals.iter().map(|eval| eval.exam.as_str()).collect()
    }

    /// Scores the baselines on every exam that the run sat. A run from a pretrained model has none.
    fn baselines(&self) -> Result<BTreeMap<&str, Baselines>> {
        if self.plan.config.base.is_some() {
            return Ok(BTreeMap::new());
        }
        let baselines = |name| {
            let problems = &self.plan.config.exam(name, Split::Dev)?;
            Ok((
                name,
                Baselines {
                    uniform_legal: baselines::uniform_legal(problems, 8)?.pass_at(1).0,
                    enumeration_1_call: baselines::enumeration(problems, 1)?.pass_at(1).0,
                },
            ))
        };
        self.exams().into_iter().map(baselines).collect()
    }
}
