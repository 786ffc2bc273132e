//! The comparison of two networks on the same problems.

use serde::Serialize;
use statrs::distribution::{Binomial, DiscreteCDF as _};

use crate::player::Scores;

/// Two networks that answered the same problems once each.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Pairing {
    num_problems: usize,
    /// Problems that the first one alone solves.
    only_first: u64,
    /// Problems that the second one alone solves.
    only_second: u64,
    /// Share of right answers of the first minus that of the second.
    difference: f64,
    /// Two-sided 95 % confidence interval of the difference. Half a problem is added to each of the four kinds, so that it has a
    /// width if no problem is solved by one alone. Source: Agresti and Min 2005, "Simple improved confidence intervals for comparing
    /// matched proportions".
    interval: [f64; 2],
    /// Two-sided p-value of McNemar's exact test: how probable so uneven a split of the problems that one alone solves is if
    /// both solve equally many.
    mcnemar_p: f64,
}

impl Pairing {
    /// Compares answers to the same problems in the same order.
    pub(crate) fn of(first: &Scores, second: &Scores) -> Pairing {
        let pairs = || first.correct.iter().zip(&second.correct).map(|(first, second)| (*first > 0, *second > 0));
        let num_problems = first.correct.len();
        let only_first = pairs().filter(|pair| *pair == (true, false)).count() as u64;
        let only_second = pairs().filter(|pair| *pair == (false, true)).count() as u64;
        let (count, gained, lost) = (num_problems as f64, only_first as f64, only_second as f64);
        let centre = (gained - lost) / (count + 2.0);
        let variance = (gained + lost + 1.0 - (gained - lost).powi(2) / (count + 2.0)) / (count + 2.0).powi(2);
        let bound = |side: f64| (centre + side * 1.959_964 * variance.sqrt()).clamp(-1.0, 1.0);
        let discordant = only_first + only_second;
        let at_most = Binomial::new(0.5, discordant).expect("a probability").cdf(only_first.min(only_second));
        Pairing {
            num_problems,
            only_first,
            only_second,
            difference: (gained - lost) / count,
            interval: [-1.0, 1.0].map(bound),
            mcnemar_p: (2.0 * at_most).min(1.0),
        }
    }

    /// Describes the comparison in one line, given the names of the networks.
    pub(crate) fn text(&self, first: &str, second: &str) -> String {
        let Pairing { only_first, only_second, difference, interval: [low, high], mcnemar_p, .. } = self;
        let p = if *mcnemar_p < 0.001 { "p < 0.001".to_owned() } else { format!("p = {mcnemar_p:.3}") };
        format!(
            "greedy, {first} minus {second}: {:+.1} points (95 % interval {:.1} to {:.1}); solved by the first alone: \
             {only_first}, by the second alone: {only_second} (McNemar's exact test: {p})",
            100.0 * difference,
            100.0 * low,
            100.0 * high,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// scipy.stats.binomtest(2, 12, 0.5).pvalue; the interval by hand: the variance is (13 - 8^2 / 42) / 42^2.
    #[test]
    fn pairs_by_hand() {
        let scores = |bits: &[(u32, usize)]| Scores {
            num_samples: 1,
            correct: bits.iter().flat_map(|(bit, times)| std::iter::repeat_n(*bit, *times)).collect(),
        };
        let (first, second) = (scores(&[(1, 18), (0, 22)]), scores(&[(1, 8), (0, 10), (1, 2), (0, 20)]));
        let pairing = Pairing::of(&first, &second);
        assert_eq!((pairing.num_problems, pairing.only_first, pairing.only_second), (40, 10, 2));
        assert!((pairing.difference - 0.2).abs() < 1e-12);
        let half_width = 1.959_964 * ((13.0 - 64.0 / 42.0) / 1764.0f64).sqrt();
        let expected = [8.0 / 42.0 - half_width, 8.0 / 42.0 + half_width];
        assert!(pairing.interval.iter().zip(expected).all(|(got, bound)| (got - bound).abs() < 1e-12), "{pairing:?}");
        assert!((pairing.mcnemar_p - 0.038_574_218_75).abs() < 1e-9, "{pairing:?}");
        let same = Pairing::of(&first, &first);
        assert_eq!((same.difference, same.mcnemar_p), (0.0, 1.0));
        assert!(same.interval[0] < 0.0 && same.interval[1] == -same.interval[0], "{same:?}");
        let says = "greedy, a minus b: +20.0 points (95 % interval 3.2 to 34.9)";
        assert!(pairing.text("a", "b").starts_with(says), "{}", pairing.text("a", "b"));
    }
}
