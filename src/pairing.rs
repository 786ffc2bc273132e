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
    /// Half-width of the two-sided 95 % confidence interval of the difference. Source: Agresti 2013, "Categorical Data Analysis",
    /// section 11.1.1.
    half_width: f64,
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
        let difference = (gained - lost) / count;
        let variance = (gained + lost - (gained - lost).powi(2) / count) / (count * count);
        let discordant = only_first + only_second;
        let at_most = Binomial::new(0.5, discordant).expect("a probability").cdf(only_first.min(only_second));
        Pairing {
            num_problems,
            only_first,
            only_second,
            difference,
            half_width: 1.959_964 * variance.sqrt(),
            mcnemar_p: (2.0 * at_most).min(1.0),
        }
    }

    /// Describes the comparison in one line; `second` names the second network.
    pub(crate) fn text(&self, second: &str) -> String {
        let Pairing { only_first, only_second, difference, half_width, mcnemar_p, .. } = self;
        let sign = if *difference < 0.0 { "" } else { "+" };
        format!(
            "greedy, minus the {second}: {sign}{:.1} points, 95 % interval {:.1} to {:.1}; {only_first} problems solved by this \
             one alone, {only_second} by the other alone, McNemar's exact test p = {mcnemar_p:.1e}",
            100.0 * difference,
            100.0 * (difference - half_width),
            100.0 * (difference + half_width),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// scipy.stats.binomtest(2, 12, 0.5).pvalue; the interval by hand: (12 - 8^2 / 40) / 40^2 is 0.0065.
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
        assert!((pairing.half_width - 1.959_964 * 0.0065f64.sqrt()).abs() < 1e-12, "{pairing:?}");
        assert!((pairing.mcnemar_p - 0.038_574_218_75).abs() < 1e-9, "{pairing:?}");
        let same = Pairing::of(&first, &first);
        assert_eq!((same.difference, same.half_width, same.mcnemar_p), (0.0, 0.0, 1.0));
    }
}
