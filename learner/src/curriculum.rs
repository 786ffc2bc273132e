use std::collections::BTreeMap;

use proto::{CounterRng, Niche};
use serde::{Deserialize, Serialize};

use crate::draw::draw;

/// Returns the learnability of problems with a solve rate: highest when half of the rollouts succeed, and positive
/// everywhere, so that no problem is abandoned for good.
pub(crate) fn learnability(solve_rate: f64) -> f64 {
    solve_rate * (1.0 - solve_rate) + 0.05
}

/// A running solve rate for every niche that was played.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Curriculum {
    domains: BTreeMap<String, BTreeMap<Niche, SolveRate>>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
struct SolveRate {
    mean: f64,
    num_groups: u64,
}

/// Minimum weight of the newest group, so that rates follow a policy that learns.
const MIN_WEIGHT: f64 = 0.1;

impl Curriculum {
    /// Records a group's solve rate.
    pub(crate) fn observe(&mut self, domain: &str, niche: Niche, solve_rate: f64) {
        let rates = match self.domains.get_mut(domain) {
            Some(rates) => rates,
            None => self.domains.entry(domain.to_owned()).or_default(),
        };
        let rate = rates.entry(niche).or_default();
        rate.num_groups += 1;
        rate.mean += (solve_rate - rate.mean) * (1.0 / rate.num_groups as f64).max(MIN_WEIGHT);
    }

    /// Draws a niche that `is_wanted`, in proportion to learnability; `None` when none was played yet.
    pub(crate) fn draw(&self, domain: &str, is_wanted: impl Fn(Niche) -> bool, rng: &mut CounterRng) -> Option<Niche> {
        let rates: Vec<(&Niche, &SolveRate)> =
            self.domains.get(domain)?.iter().filter(|(niche, _)| is_wanted(**niche)).collect();
        (!rates.is_empty()).then(|| *draw(rng, &rates, |(_, rate)| learnability(rate.mean)).0)
    }
}

#[cfg(test)]
mod tests {
    use proto::Purpose;

    use super::*;

    #[test]
    fn niches_are_drawn_in_proportion_to_learnability() {
        let mut curriculum = Curriculum::default();
        for (niche, rates) in [(1, [0.5, 0.5]), (2, [0.0, 0.0]), (3, [1.0, 1.0])] {
            rates.into_iter().for_each(|rate| curriculum.observe("countdown", Niche(niche), rate));
        }
        let mut rng = CounterRng::new(0, Purpose::Plan, 0, 0, 0);
        let mut counts = BTreeMap::<Niche, u32>::new();
        for _ in 0..8_000 {
            *counts.entry(curriculum.draw("countdown", |_| true, &mut rng).unwrap()).or_default() += 1;
        }
        // 0.30, 0.05 and 0.05 of 0.40
        for (niche, expected) in [(1, 6_000), (2, 1_000), (3, 1_000)] {
            assert!(counts[&Niche(niche)].abs_diff(expected) < 150, "{counts:?}");
        }
        assert_eq!(curriculum.draw("countdown", |niche| niche.0 == 2, &mut rng), Some(Niche(2)));
        assert_eq!(curriculum.draw("countdown", |niche| niche.0 == 4, &mut rng), None);
        assert_eq!(curriculum.draw("programs", |_| true, &mut rng), None);
    }

    #[test]
    fn rates_are_means_at_first_and_follow_the_policy_later() {
        let mut curriculum = Curriculum::default();
        [0.0, 1.0].into_iter().for_each(|rate| curriculum.observe("d", Niche(7), rate));
        assert_eq!(curriculum.domains["d"][&Niche(7)].mean, 0.5);
        (0..100).for_each(|_| curriculum.observe("d", Niche(7), 1.0));
        assert!(curriculum.domains["d"][&Niche(7)].mean > 0.999);
    }
}
