use proto::{ScoredGroup, StopReason, Verdict};
use serde::{Deserialize, Serialize};

/// Statistics of a batch's answers to problems.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AnswersReport {
    /// Share that ended by themselves, not by the limit on tokens.
    pub ended_share: f64,
    /// Mean number of tokens, forced ones and the end token included.
    pub mean_tokens: f64,
    /// Share of the groups with answers that solve their problem and answers that do not. Others have no advantage.
    pub mixed_share: f64,
}

impl AnswersReport {
    /// Returns the statistics; `None` if no group answers a problem.
    pub(super) fn of(groups: &[ScoredGroup]) -> Option<AnswersReport> {
        let answered: Vec<&ScoredGroup> =
            groups.iter().filter(|scored| scored.group.task.request.problem().is_some()).collect();
        let answers: Vec<_> = answered.iter().flat_map(|scored| &scored.group.rollouts).collect();
        let is_mixed = |scored: &&&ScoredGroup| {
            let is_correct = |verdict: &Verdict| *verdict == Verdict::Correct;
            scored.verdicts.iter().any(is_correct) && !scored.verdicts.iter().all(is_correct)
        };
        let share = |count: usize, of: usize| count as f64 / of as f64;
        (!answers.is_empty()).then(|| AnswersReport {
            ended_share: share(
                answers.iter().filter(|answer| answer.stop == StopReason::Complete).count(),
                answers.len(),
            ),
            mean_tokens: share(answers.iter().map(|answer| answer.tokens.len()).sum(), answers.len()),
            mixed_share: share(answered.iter().filter(is_mixed).count(), answered.len()),
        })
    }
}

#[cfg(test)]
mod tests {
    use proto::{Difficulty, Niche, Request};

    use super::*;
    use crate::test_groups::{RIGHT, WRONG, group};

    /// By hand: 7 answers of 2 + 4 + 3 + 3 + 1 + 6 + 2 = 21 tokens, of which two reach the limit, in one mixed group of three. A
    /// group of proposals does not count.
    #[test]
    fn answers_are_counted() {
        let mut mixed = group(&[(RIGHT, 2), (WRONG, 4)]);
        mixed.group.rollouts[1].stop = StopReason::Length;
        let all_right = group(&[(RIGHT, 3), (RIGHT, 3)]);
        let mut all_wrong = group(&[(WRONG, 1), (Verdict::Malformed, 6), (WRONG, 2)]);
        all_wrong.group.rollouts[1].stop = StopReason::Length;
        let mut proposals = group(&[(RIGHT, 20), (WRONG, 20)]);
        proposals.group.task.request =
            Request::Propose { domain: "countdown".to_owned(), niche: Niche(0), difficulty: Difficulty::Hard };
        let report = AnswersReport::of(&[mixed, all_right, proposals.clone(), all_wrong]).unwrap();
        assert_eq!(report, AnswersReport { ended_share: 5.0 / 7.0, mean_tokens: 3.0, mixed_share: 1.0 / 3.0 });
        assert_eq!(AnswersReport::of(&[proposals]), None);
    }
}
