//! The table of a study: every arm's scores, and the paired differences to the control at equal seeds.

use std::collections::BTreeMap;

use serde::Serialize;
use statrs::distribution::{ContinuousCDF as _, StudentsT};

use super::rows::Row;
use crate::report::{count, percent, table};

#[derive(Debug, Serialize)]
pub(crate) struct Table {
    control: String,
    /// Cost of the runs of each arm.
    costs: Vec<Cost>,
    scores: Vec<Score>,
}

type Figure = fn(&Row) -> f64;

/// Means over the runs of an arm.
#[derive(Debug, Serialize)]
struct Cost {
    arm: String,
    /// Number of runs.
    n: usize,
    steps: f64,
    trained_tokens: f64,
    cpu_seconds: f64,
    wall_seconds: f64,
    entropy_nats: f64,
}

/// An arm's score of one kind on one exam.
#[derive(Debug, Serialize)]
struct Score {
    exam: String,
    /// `pass@1 greedy`, `pass@1 sampled` or `pass@k`.
    score: String,
    arm: String,
    /// Number of runs.
    n: usize,
    mean: f64,
    min: f64,
    max: f64,
    /// Absent for the control, and if the arm has no seed in common with it.
    difference: Option<Difference>,
}

/// A mean of paired differences to the control.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Difference {
    /// Number of seeds that both arms have.
    n: usize,
    mean: f64,
    /// Half-width of the two-sided 95 % confidence interval; absent for one pair, which has no spread.
    half_width: Option<f64>,
}

impl Table {
    /// Compares the arms on each exam, given the rows of each arm.
    pub(crate) fn new(control: &str, exams: &[String], arms: Vec<(String, Vec<Row>)>) -> Table {
        let costs = arms.iter().filter_map(|(arm, rows)| Cost::of(arm, rows)).collect();
        let mut scores = Vec::new();
        for exam in exams {
            let k = arms.iter().flat_map(|(_, rows)| rows).map(|row| row.k).next().unwrap_or(1);
            let kinds: [(String, Figure); 3] = [
                ("pass@1 greedy".to_owned(), |row| row.pass_at_1_greedy),
                ("pass@1 sampled".to_owned(), |row| row.pass_at_1_sampled),
                (format!("pass@{k}"), |row| row.pass_at_k),
            ];
            // With one sample per problem the last two are the same.
            for (name, score) in kinds.into_iter().take(if k > 1 { 3 } else { 2 }) {
                let by_seed = |rows: &[Row]| -> BTreeMap<u64, f64> {
                    rows.iter().filter(|row| row.exam == *exam).map(|row| (row.seed, score(row))).collect()
                };
                let of_control = arms.iter().find(|(arm, _)| arm == control).map(|(_, rows)| by_seed(rows));
                for (arm, rows) in &arms {
                    let baseline = of_control.as_ref().filter(|_| arm != control);
                    scores.extend(Score::of(exam, &name, arm, &by_seed(rows), baseline));
                }
            }
        }
        Table { control: control.to_owned(), costs, scores }
    }

    pub(crate) fn text(&self) -> String {
        if self.costs.is_empty() {
            return "no run has finished yet\n".to_owned();
        }
        let head = ["means", "runs", "steps", "trained tokens", "CPU s", "wall s", "entropy, nats"];
        let (mut costs, mut scores) = (vec![head.map(str::to_owned).to_vec()], Vec::new());
        costs.extend(self.costs.iter().map(|cost| {
            vec![
                cost.arm.clone(),
                cost.n.to_string(),
                format!("{:.0}", cost.steps),
                count(cost.trained_tokens),
                format!("{:.1}", cost.cpu_seconds),
                format!("{:.1}", cost.wall_seconds),
                format!("{:.3}", cost.entropy_nats),
            ]
        }));
        for group in self.scores.chunk_by(|one, next| (&one.exam, &one.score) == (&next.exam, &next.score)) {
            let head = format!("{}, {}", group[0].exam, group[0].score);
            let against = format!("minus {}, in points", self.control);
            scores.push(Vec::new());
            scores.push(vec![head, "mean".to_owned(), "min .. max".to_owned(), against, "pairs".to_owned()]);
            scores.extend(group.iter().map(Score::cells));
        }
        table(&costs)
            + &table(&scores)
            + "\ndifferences are paired by seed, with two-sided 95 % t intervals over the pairs\n"
    }
}

impl Cost {
    fn of(arm: &str, rows: &[Row]) -> Option<Cost> {
        // A run has a row for every exam.
        let runs: BTreeMap<u64, &Row> = rows.iter().map(|row| (row.seed, row)).collect();
        let mean = |figure: Figure| runs.values().map(|row| figure(row)).sum::<f64>() / runs.len() as f64;
        (!runs.is_empty()).then(|| Cost {
            arm: arm.to_owned(),
            n: runs.len(),
            steps: mean(|row| row.steps as f64),
            trained_tokens: mean(|row| row.trained_tokens as f64),
            cpu_seconds: mean(|row| row.cpu_seconds),
            wall_seconds: mean(|row| row.wall_seconds),
            entropy_nats: mean(|row| row.entropy_nats),
        })
    }
}

impl Score {
    /// Returns `None` for an arm without a finished run.
    fn of(
        exam: &str,
        score: &str,
        arm: &str,
        by_seed: &BTreeMap<u64, f64>,
        control: Option<&BTreeMap<u64, f64>>,
    ) -> Option<Score> {
        let differences = |control: &BTreeMap<u64, f64>| -> Vec<f64> {
            by_seed.iter().filter_map(|(seed, value)| Some(value - control.get(seed)?)).collect()
        };
        let values = by_seed.values().copied();
        (!by_seed.is_empty()).then(|| Score {
            exam: exam.to_owned(),
            score: score.to_owned(),
            arm: arm.to_owned(),
            n: by_seed.len(),
            mean: values.clone().sum::<f64>() / by_seed.len() as f64,
            min: values.clone().fold(f64::INFINITY, f64::min),
            max: values.fold(f64::NEG_INFINITY, f64::max),
            difference: control.and_then(|control| Difference::of(&differences(control))),
        })
    }

    fn cells(&self) -> Vec<String> {
        let points = |share: f64| format!("{:+.1}", 100.0 * share);
        let (difference, pairs) = match self.difference {
            None => ("-".to_owned(), "-".to_owned()),
            Some(Difference { n, mean, half_width: None }) => {
                (format!("{}, no interval from one pair", points(mean)), n.to_string())
            }
            Some(Difference { n, mean, half_width: Some(half) }) => {
                (format!("{} [{}, {}]", points(mean), points(mean - half), points(mean + half)), n.to_string())
            }
        };
        let spread = format!("{:.1} .. {:.1}", 100.0 * self.min, 100.0 * self.max);
        vec![self.arm.clone(), percent(self.mean), spread, difference, pairs]
    }
}

impl Difference {
    fn of(differences: &[f64]) -> Option<Difference> {
        let n = differences.len();
        let mean = differences.iter().sum::<f64>() / n as f64;
        let half_width = (n > 1).then(|| {
            let variance = differences.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (n - 1) as f64;
            let students_t = StudentsT::new(0.0, 1.0, (n - 1) as f64).expect("one degree of freedom or more");
            students_t.inverse_cdf(0.975) * (variance / n as f64).sqrt()
        });
        (n > 0).then_some(Difference { n, mean, half_width })
    }
}

#[cfg(test)]
mod tests {
    use super::super::rows::row;
    use super::*;

    /// d = numpy.array([0.1, 0.2, 0.6]); scipy.stats.ttest_1samp(d, 0).confidence_interval(0.95): 0.3 ± 0.657240
    #[test]
    fn interval_by_hand() {
        let Difference { n, mean, half_width } = Difference::of(&[0.1, 0.2, 0.6]).unwrap();
        assert_eq!(n, 3);
        assert!((mean - 0.3).abs() < 1e-12);
        assert!((half_width.unwrap() - 0.657_240).abs() < 1e-5, "{half_width:?}");
        // scipy.stats.t.ppf(0.975, 1) = 12.706205, with a standard error of 0.5
        let two = Difference::of(&[1.0, 2.0]).unwrap();
        assert!((two.half_width.unwrap() - 0.5 * 12.706_205).abs() < 1e-4, "{two:?}");
        assert_eq!(Difference::of(&[0.25]), Some(Difference { n: 1, mean: 0.25, half_width: None }));
        assert_eq!(Difference::of(&[]), None);
    }

    #[test]
    fn arms_are_paired_by_seed() {
        let control = vec![row("control", 0, 0.5), row("control", 1, 0.75), row("control", 2, 0.25)];
        let other = vec![row("other", 2, 0.5), row("other", 0, 0.5), row("other", 7, 0.0)];
        let arms = vec![("control".to_owned(), control), ("other".to_owned(), other), ("empty".to_owned(), Vec::new())];
        let table = Table::new("control", &["countdown-3".to_owned()], arms);
        let greedy: Vec<&Score> = table.scores.iter().filter(|score| score.score == "pass@1 greedy").collect();
        assert_eq!(greedy.iter().map(|score| score.arm.as_str()).collect::<Vec<_>>(), ["control", "other"]);
        assert_eq!((greedy[0].n, greedy[0].mean, greedy[0].min, greedy[0].max), (3, 0.5, 0.25, 0.75));
        assert_eq!(greedy[0].difference, None);
        let difference = greedy[1].difference.unwrap();
        assert_eq!((difference.n, difference.mean), (2, 0.125), "seeds 0 and 2");
        assert_eq!(greedy[1].n, 3);
        assert!(table.text().contains("minus control, in points"), "{}", table.text());
    }

    #[test]
    fn one_pair_has_no_interval_and_says_so() {
        let arms = vec![("a".to_owned(), vec![row("a", 0, 0.5)]), ("b".to_owned(), vec![row("b", 0, 0.375)])];
        let text = Table::new("a", &["countdown-3".to_owned()], arms).text();
        assert!(text.contains("-12.5, no interval from one pair"), "{text}");
    }
}
