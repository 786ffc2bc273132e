//! Exams: extra tasks of one version. Their results are reported and do not influence the run.

use std::collections::BTreeSet;
use std::sync::Arc;

use policy::write_weights;
use proto::{Digest, KeyedProblem, ProblemKey, ScoredGroup, Task, Verdict};
use tokio::task::block_in_place;

use super::{Exam, Learner};
use crate::Error;
use crate::event::Event;
use crate::journal::{EvalRecord, Record};

/// Exams in progress, all with the weights of one version.
pub(super) struct Sitting {
    pub(super) step: u64,
    pub(super) weights: (Digest, Arc<[u8]>),
    /// With the keys of their problems.
    pub(super) tasks: Vec<(Task, Option<ProblemKey>)>,
    /// Name and number of problems, in order of the tasks.
    pub(super) parts: Vec<(String, usize)>,
    pub(super) correct: Vec<Option<bool>>,
}

impl Learner<'_> {
    /// Issues the tasks of exams that are due and not in the journal yet.
    pub(super) async fn begin_sitting(&mut self, step: u64, ends: bool) -> Result<(), Error> {
        let every = self.fold.config().exams.every_steps;
        let due = step == 0 || ends || (every > 0 && step.is_multiple_of(every));
        let done: BTreeSet<&str> =
            self.evals.iter().filter(|eval| eval.step == step).map(|eval| eval.exam.as_str()).collect();
        let open: Vec<&Exam> = self.exams.iter().filter(|exam| due && !done.contains(exam.name.as_str())).collect();
        if open.is_empty() {
            return Ok(());
        }
        let model = &self.fold.config().model;
        let weights: (Digest, Arc<[u8]>) = block_in_place(|| {
            let average = self.fold.trainer().average()?;
            let digest = average.digest(model);
            // Without a decay the average is the weights.
            let published = self.published.versions.get(&digest).cloned();
            Ok::<_, Error>((digest, published.unwrap_or_else(|| write_weights(model, &[("", &average)]).into())))
        })?;
        let problems: Vec<KeyedProblem> = open.iter().flat_map(|exam| exam.problems.iter().cloned()).collect();
        let tasks = self.fold.exam_tasks(weights.0, &problems);
        let tasks: Vec<_> = tasks.into_iter().zip(problems).map(|(task, keyed)| (task, keyed.key)).collect();
        let parts = open.iter().map(|exam| (exam.name.clone(), exam.problems.len())).collect();
        self.bus.put_weights(weights.0, weights.1.clone()).await?;
        let issued = tasks.clone();
        self.sitting = Some(Sitting { step, weights, correct: vec![None; tasks.len()], tasks, parts });
        self.issue(issued).await
    }

    pub(super) fn accept_exam_answer(&mut self, scored: &ScoredGroup) -> Result<(), Error> {
        let id = scored.group.task.id;
        let Some(sitting) = self.sitting.as_mut().filter(|sitting| sitting.step == id.batch) else { return Ok(()) };
        if sitting.tasks.get(id.index as usize).map(|(task, _)| task) != Some(&scored.group.task) {
            return Ok(());
        }
        let answer = &mut sitting.correct[id.index as usize];
        if answer.is_some() {
            self.counts.num_duplicates += 1;
            return Ok(());
        }
        *answer = Some(scored.verdicts.first() == Some(&Verdict::Correct));
        let is_over = sitting.correct.iter().all(Option::is_some);
        self.close(id);
        if !is_over {
            return Ok(());
        }
        let Some(sitting) = self.sitting.take() else { return Ok(()) };
        self.ledger.forget(&sitting.tasks.iter().map(|(task, _)| task.id).collect::<Vec<_>>());
        let mut correct = sitting.correct.into_iter();
        for (exam, num_problems) in sitting.parts {
            let num_correct = correct.by_ref().take(num_problems).filter(|correct| *correct == Some(true)).count();
            let eval = EvalRecord {
                step: sitting.step,
                exam,
                num_correct: num_correct as u64,
                num_problems: num_problems as u64,
            };
            self.append(Record::Eval(eval.clone()));
            self.tell(Event::Eval(eval.clone()))?;
            self.evals.push(eval);
        }
        Ok(())
    }
}
