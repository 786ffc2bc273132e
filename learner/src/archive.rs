use std::collections::BTreeMap;

use proto::{CounterRng, KeyedProblem, Niche};
use serde::{Deserialize, Serialize};

/// Problems worth keeping, a few of each niche (quality-diversity: Mouret and Clune 2015).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Archive {
    domains: BTreeMap<String, BTreeMap<Niche, Vec<Entry>>>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Entry {
    keyed: KeyedProblem,
    /// What there was to learn when it was measured, less with every step since.
    score: f64,
}

/// Problems of a niche.
const CAPACITY: usize = 8;
/// Problems of a domain; the one with the lowest score goes first.
const MAX_PROBLEMS: usize = 8_192;
/// What a step leaves of a score.
const DECAY: f64 = 0.97;

impl Archive {
    /// Keeps a problem with its newest score, unless its niche is full of better ones.
    pub(crate) fn keep(&mut self, keyed: &KeyedProblem, niche: Niche, score: f64) {
        let niches = self.domains.entry(keyed.problem.domain.clone()).or_default();
        let entries = niches.entry(niche).or_default();
        if let Some(known) = entries.iter_mut().find(|entry| entry.keyed.problem == keyed.problem) {
            known.score = score;
            return;
        }
        let entry = Entry { keyed: keyed.clone(), score };
        if entries.len() < CAPACITY {
            entries.push(entry);
        } else if let Some(worst) = entries.iter_mut().min_by(|left, right| left.score.total_cmp(&right.score))
            && worst.score < score
        {
            *worst = entry;
        }
        if niches.values().map(Vec::len).sum::<usize>() > MAX_PROBLEMS {
            let_worst_go(niches);
        }
    }

    /// Ends a step.
    pub(crate) fn decay(&mut self) {
        let entries = self.domains.values_mut().flat_map(BTreeMap::values_mut).flatten();
        entries.for_each(|entry| entry.score *= DECAY);
    }

    /// Draws a problem, uniformly over the domain's niches that are wanted, then over the niche; `None` when there is none.
    pub(crate) fn draw(
        &self,
        domain: &str,
        is_wanted: impl Fn(Niche) -> bool,
        rng: &mut CounterRng,
    ) -> Option<&KeyedProblem> {
        let niches: Vec<(&Niche, &Vec<Entry>)> =
            self.domains.get(domain)?.iter().filter(|(niche, _)| is_wanted(**niche)).collect();
        if niches.is_empty() {
            return None;
        }
        let (_, entries) = niches[rng.below(niches.len() as u64) as usize];
        Some(&entries[rng.below(entries.len() as u64) as usize].keyed)
    }

    /// Counts niches and problems.
    pub(crate) fn size(&self) -> (usize, usize) {
        let niches = self.domains.values().flat_map(BTreeMap::values);
        niches.fold((0, 0), |(num_niches, num_problems), entries| (num_niches + 1, num_problems + entries.len()))
    }
}

fn let_worst_go(niches: &mut BTreeMap<Niche, Vec<Entry>>) {
    let scores = niches
        .iter()
        .flat_map(|(niche, entries)| entries.iter().enumerate().map(|(place, entry)| (entry.score, *niche, place)));
    let Some((_, niche, place)) = scores.min_by(|left, right| left.0.total_cmp(&right.0)) else { return };
    if let Some(entries) = niches.get_mut(&niche) {
        entries.remove(place);
        if entries.is_empty() {
            niches.remove(&niche);
        }
    }
}

#[cfg(test)]
mod tests {
    use proto::{Problem, Purpose};

    use super::*;

    fn keyed(text: &str) -> KeyedProblem {
        KeyedProblem { problem: Problem { domain: "d".to_owned(), text: text.to_owned() }, key: None }
    }

    #[test]
    fn a_full_niche_lets_its_worst_problem_go_for_a_better_one() {
        let mut archive = Archive::default();
        for number in 0..CAPACITY {
            archive.keep(&keyed(&number.to_string()), Niche(1), 0.1 + number as f64);
        }
        archive.keep(&keyed("worse"), Niche(1), 0.05);
        assert_eq!(archive.size(), (1, CAPACITY));
        let texts = |archive: &Archive| -> Vec<String> {
            archive.domains["d"][&Niche(1)].iter().map(|entry| entry.keyed.problem.text.clone()).collect()
        };
        assert!(!texts(&archive).contains(&"worse".to_owned()));
        archive.keep(&keyed("better"), Niche(1), 0.2);
        assert!(texts(&archive).contains(&"better".to_owned()) && !texts(&archive).contains(&"0".to_owned()));
        // Measured again, a problem takes its new score; old scores fade until a newcomer beats them.
        archive.keep(&keyed("better"), Niche(1), 0.01);
        archive.keep(&keyed("newer"), Niche(1), 0.02);
        assert!(!texts(&archive).contains(&"better".to_owned()));
        (0..100).for_each(|_| archive.decay());
        archive.keep(&keyed("late"), Niche(1), 0.01);
        assert!(texts(&archive).contains(&"late".to_owned()));
    }

    #[test]
    fn a_full_archive_lets_its_worst_problem_go() {
        let mut archive = Archive::default();
        for number in 0..=MAX_PROBLEMS {
            let score = if number == 77 { 0.01 } else { 0.3 };
            archive.keep(&keyed(&number.to_string()), Niche(number as u64), score);
        }
        assert_eq!(archive.size(), (MAX_PROBLEMS, MAX_PROBLEMS));
        assert!(!archive.domains["d"].contains_key(&Niche(77)));
    }

    #[test]
    fn draws_are_uniform_over_niches() {
        let mut archive = Archive::default();
        (0..8).for_each(|number| archive.keep(&keyed(&number.to_string()), Niche(1), 1.0));
        archive.keep(&keyed("alone"), Niche(2), 1.0);
        let mut rng = CounterRng::new(0, Purpose::Plan, 0, 0, 0);
        let num_alone =
            (0..2_000).filter(|_| archive.draw("d", |_| true, &mut rng).unwrap().problem.text == "alone").count();
        assert!(num_alone.abs_diff(1_000) < 100, "{num_alone}");
        assert_eq!(archive.draw("d", |niche| niche.0 == 2, &mut rng).unwrap().problem.text, "alone");
        assert_eq!(archive.draw("d", |niche| niche.0 == 3, &mut rng), None);
        assert_eq!(archive.draw("other", |_| true, &mut rng), None);
    }
}
