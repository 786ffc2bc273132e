//! Baselines for the rewards of proposals.

use std::collections::BTreeMap;

use proto::{Difficulty, Niche};
use serde::{Deserialize, Serialize};

/// Running means of rewards, by domain, by requested level and difficulty, and by requested niche and difficulty.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Baselines {
    domains: BTreeMap<String, RunningMean>,
    levels: BTreeMap<(String, u32, Difficulty), RunningMean>,
    niches: BTreeMap<(String, Niche, Difficulty), RunningMean>,
}

/// A running mean that starts at the value of the next coarser mean.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
struct RunningMean {
    /// The weighted sum of its own rewards.
    own: f64,
    /// The remaining weight of the coarser mean.
    rest: f64,
}

/// The niche and the difficulty that a proposal was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Asked {
    pub(crate) niche: Niche,
    pub(crate) difficulty: Difficulty,
}

/// Weight of the previous mean in each update (Liu et al. 2025, SPIRAL, whose roles are not split further).
const DECAY: f64 = 0.95;

impl Baselines {
    /// Computes the advantage of a reward over the mean of proposals with the same request, and updates the means with it.
    ///
    /// After n rewards r_1 .. r_n a mean is `b = 0.95^n c + 0.05 (0.95^(n-1) r_1 + .. + r_n)`, where c is the next coarser
    /// mean: niche and difficulty, level and difficulty, domain, 0. So rare requests are compared with similar ones.
    ///
    /// Source: role-conditioned advantage estimation (Liu et al. 2025, SPIRAL), which has one such mean per role, with c = 0.
    pub(crate) fn advantage(&mut self, domain: &str, level: u32, asked: Asked, reward: f64) -> f64 {
        let Asked { niche, difficulty } = asked;
        let means = [
            self.domains.entry(domain.to_owned()).or_default(),
            self.levels.entry((domain.to_owned(), level, difficulty)).or_default(),
            self.niches.entry((domain.to_owned(), niche, difficulty)).or_default(),
        ];
        let mut baseline = 0.0;
        for mean in means {
            baseline = mean.own + mean.rest * baseline;
            mean.take(reward);
        }
        reward - baseline
    }
}

impl RunningMean {
    fn take(&mut self, reward: f64) {
        self.own = DECAY * self.own + (1.0 - DECAY) * reward;
        self.rest *= DECAY;
    }
}

impl Default for RunningMean {
    fn default() -> RunningMean {
        RunningMean { own: 0.0, rest: 1.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HARD: Difficulty = Difficulty::Hard;
    const EASY: Difficulty = Difficulty::Easy;

    fn asked(niche: u64, difficulty: Difficulty) -> Asked {
        Asked { niche: Niche(niche), difficulty }
    }

    #[track_caller]
    fn assert_advantages(baselines: &mut Baselines, cases: &[(&str, u32, Asked, f64, f64)]) {
        for (number, (domain, level, asked, reward, baseline)) in cases.iter().enumerate() {
            let advantage = baselines.advantage(domain, *level, *asked, *reward);
            assert!(
                (advantage - (reward - baseline)).abs() < 1e-12,
                "{number}: {advantage}, not {reward} - {baseline}"
            );
        }
    }

    /// By hand. A reward of 1 moves each of its means from c to 0.95 c + 0.05.
    #[test]
    fn what_was_never_asked_for_is_compared_with_what_is_like_it() {
        let mut baselines = Baselines::default();
        assert_advantages(
            &mut baselines,
            &[
                ("d", 1, asked(1, HARD), 1.0, 0.0),
                // Domain 0.05; level and niche have 0.05 of their own and 0.95 of the next coarser mean.
                ("d", 1, asked(1, HARD), 1.0, 0.05 + 0.95 * (0.05 + 0.95 * 0.05)),
                // Domain 0.0975; the level has 0.0975 of its own and 0.9025 of the domain's mean; the niche is new.
                ("d", 1, asked(2, HARD), 0.0, 0.0975 + 0.9025 * 0.0975),
                // The difficulty is new: the baseline is the domain's mean, after the reward of 0 just before.
                ("d", 1, asked(1, EASY), 0.0, 0.95 * 0.0975),
                // So is the level.
                ("d", 2, asked(3, HARD), 0.0, 0.95 * 0.95 * 0.0975),
                ("other", 1, asked(1, HARD), 0.5, 0.0),
            ],
        );
    }

    /// Hard proposals of niche 1 always earn 0.8, easy ones of niche 2 always 0.2: neither affects the other's advantage.
    #[test]
    fn what_is_often_asked_for_has_a_mean_of_its_own() {
        let mut baselines = Baselines::default();
        let mut last = [1.0; 2];
        for _ in 0..200 {
            last = [(1, HARD, 0.8), (2, EASY, 0.2)]
                .map(|(niche, difficulty, reward)| baselines.advantage("d", 1, asked(niche, difficulty), reward));
        }
        assert!(last.iter().all(|advantage| advantage.abs() < 1e-4), "{last:?}");
    }
}
