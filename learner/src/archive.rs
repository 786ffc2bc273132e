use std::cmp::Ordering;
use std::collections::BTreeMap;

use proto::{CounterRng, KeyedProblem, Niche};
use serde::{Deserialize, Serialize};

use crate::curriculum::learnability;
use crate::draw::draw;

/// Problems worth keeping, a few of each niche (quality-diversity: Mouret and Clune 2015).
///
/// A measurement stays valid until the problem is measured again, at any age. Age only makes another measurement more likely,
/// and breaks ties between problems of equal learnability. A problem that all or none of the rollouts solve never replaces
/// one that some of them solve.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Archive {
    domains: BTreeMap<String, BTreeMap<Niche, Vec<Entry>>>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Entry {
    keyed: KeyedProblem,
    /// As of its latest measurement.
    learnability: f64,
    /// Step of that measurement.
    measured_at: u64,
}

/// Maximum number of problems of a niche.
const CAPACITY: usize = 8;
/// Maximum number of problems of a domain.
const MAX_PROBLEMS: usize = 8_192;
/// Share of the problems to pose again that are drawn by age.
///
/// Source: the staleness coefficient of Jiang et al. 2021 (prioritized level replay, arXiv 2010.03934).
const STALENESS_SHARE: f64 = 0.1;

impl Archive {
    /// Records the measurement of a problem. A known problem is updated, or removed when all or none of the rollouts solve it.
    /// A new one is kept unless its niche or its domain is full of better ones.
    pub(crate) fn measure(&mut self, keyed: &KeyedProblem, niche: Niche, solve_rate: f64, step: u64) {
        let niches = self.domains.entry(keyed.problem.domain.clone()).or_default();
        let entries = niches.entry(niche).or_default();
        let measured = Entry { keyed: keyed.clone(), learnability: learnability(solve_rate), measured_at: step };
        let known = entries.iter().position(|entry| entry.keyed.problem == keyed.problem);
        match known {
            Some(place) if solve_rate > 0.0 && solve_rate < 1.0 => entries[place] = measured,
            Some(place) => drop(entries.remove(place)),
            None => entries.push(measured),
        }
        if entries.len() > CAPACITY
            && let Some((place, _)) = entries.iter().enumerate().min_by(|left, right| by_worth(left.1, right.1))
        {
            entries.remove(place);
        }
        if entries.is_empty() {
            niches.remove(&niche);
        }
        if niches.values().map(Vec::len).sum::<usize>() > MAX_PROBLEMS {
            let_worst_go(niches);
        }
    }

    /// Draws a problem from the wanted niches of the domain: first a niche in proportion to its mean learnability, so that
    /// its size does not matter, then one of its problems in proportion to theirs. Returns `None` when there is none.
    pub(crate) fn draw(
        &self,
        domain: &str,
        is_wanted: impl Fn(Niche) -> bool,
        rng: &mut CounterRng,
    ) -> Option<&KeyedProblem> {
        let niches = self.wanted(domain, is_wanted)?;
        let entries = *draw(rng, &niches, |entries| mean_learnability(entries));
        Some(&draw(rng, entries, |entry| entry.learnability).keyed)
    }

    /// Draws a problem to pose and measure again: with probability [`STALENESS_SHARE`] in proportion to the steps since its
    /// measurement, else as [`Archive::draw`] does.
    pub(crate) fn draw_again(
        &self,
        domain: &str,
        is_wanted: impl Fn(Niche) -> bool,
        step: u64,
        rng: &mut CounterRng,
    ) -> Option<&KeyedProblem> {
        if rng.unit_f64() >= STALENESS_SHARE {
            return self.draw(domain, is_wanted, rng);
        }
        let entries: Vec<&Entry> = self.wanted(domain, is_wanted)?.into_iter().flatten().collect();
        Some(&draw(rng, &entries, |entry| 1.0 + step.saturating_sub(entry.measured_at) as f64).keyed)
    }

    /// Counts niches and problems.
    pub(crate) fn size(&self) -> (usize, usize) {
        let niches = self.domains.values().flat_map(BTreeMap::values);
        niches.fold((0, 0), |(num_niches, num_problems), entries| (num_niches + 1, num_problems + entries.len()))
    }

    /// Returns the wanted niches, in order; `None` when there are none.
    fn wanted(&self, domain: &str, is_wanted: impl Fn(Niche) -> bool) -> Option<Vec<&Vec<Entry>>> {
        let niches = self.domains.get(domain)?.iter().filter(|(niche, _)| is_wanted(**niche));
        let niches: Vec<&Vec<Entry>> = niches.map(|(_, entries)| entries).collect();
        (!niches.is_empty()).then_some(niches)
    }
}

/// Orders problems by value: by learnability, and among equals the one that was measured later is worth more.
fn by_worth(left: &Entry, right: &Entry) -> Ordering {
    left.learnability.total_cmp(&right.learnability).then(left.measured_at.cmp(&right.measured_at))
}

fn mean_learnability(entries: &[Entry]) -> f64 {
    entries.iter().map(|entry| entry.learnability).sum::<f64>() / entries.len() as f64
}

fn let_worst_go(niches: &mut BTreeMap<Niche, Vec<Entry>>) {
    let all = niches
        .iter()
        .flat_map(|(niche, entries)| entries.iter().enumerate().map(|(place, entry)| (*niche, place, entry)));
    let Some((niche, place, _)) = all.min_by(|left, right| by_worth(left.2, right.2)) else { return };
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

    fn texts(archive: &Archive) -> Vec<&str> {
        let entries = archive.domains["d"].values().flatten();
        entries.map(|entry| entry.keyed.problem.text.as_str()).collect()
    }

    fn rng(index: u64) -> CounterRng {
        CounterRng::new(0, Purpose::Plan, 0, index, 0)
    }

    /// For 200 steps, problems that no or all rollouts solve arrive in this and other niches, until the domain is full.
    #[test]
    fn what_can_be_learned_outlives_any_number_of_problems_that_cannot() {
        let mut archive = Archive::default();
        let learnable: Vec<String> = (0..CAPACITY).map(|number| format!("learnable {number}")).collect();
        for text in &learnable {
            archive.measure(&keyed(text), Niche(1), 0.25, 0);
        }
        for step in 1..=200 {
            for number in 0..50 {
                let solve_rate = [0.0, 1.0][number as usize % 2];
                // One of them in the niche of the learnable ones.
                let niche = if number == 0 { Niche(1) } else { Niche(2 + (50 * step + number) % 2_000) };
                archive.measure(&keyed(&format!("{step} {number}")), niche, solve_rate, step);
            }
        }
        assert_eq!(archive.size().1, MAX_PROBLEMS);
        let kept = texts(&archive);
        assert!(learnable.iter().all(|text| kept.contains(&text.as_str())), "{kept:?}");
        // The remaining room is for problems that were not solved yet, newest first: a later policy may solve them.
        assert!(kept.contains(&"200 49") && !kept.contains(&"1 1"));
        // Only better ones push them out.
        for number in 0..CAPACITY {
            archive.measure(&keyed(&format!("better {number}")), Niche(1), 0.5, 201);
        }
        assert!(texts(&archive).iter().all(|text| !text.starts_with("learnable")));
    }

    #[test]
    fn a_full_niche_lets_the_least_learnable_problem_go_and_among_equals_the_oldest() {
        let mut archive = Archive::default();
        for number in 0..CAPACITY as u64 {
            // Those with an even number are worth more; 1 was measured first of the others.
            archive.measure(&keyed(&number.to_string()), Niche(1), [0.5, 0.125][number as usize % 2], 10 + number);
        }
        archive.measure(&keyed("worse"), Niche(1), 1.0, 30);
        assert_eq!(archive.size(), (1, CAPACITY));
        assert_eq!(texts(&archive), ["0", "1", "2", "3", "4", "5", "6", "7"]);
        archive.measure(&keyed("equal"), Niche(1), 0.875, 31);
        assert_eq!(texts(&archive), ["0", "2", "3", "4", "5", "6", "7", "equal"]);
        archive.measure(&keyed("better"), Niche(1), 0.25, 32);
        assert_eq!(texts(&archive), ["0", "2", "4", "5", "6", "7", "equal", "better"]);
    }

    #[test]
    fn a_problem_that_is_measured_again_takes_the_new_measurement_or_leaves() {
        let mut archive = Archive::default();
        let learnability_of = |archive: &Archive| archive.domains["d"][&Niche(1)][0].learnability;
        archive.measure(&keyed("a"), Niche(1), 0.5, 0);
        archive.measure(&keyed("a"), Niche(1), 0.25, 1);
        assert_eq!((archive.size(), learnability_of(&archive)), ((1, 1), learnability(0.25)));
        archive.measure(&keyed("a"), Niche(1), 1.0, 2);
        assert_eq!(archive.size(), (0, 0), "nothing is left to learn from it, and its niche is gone");
        // No rollout solves it: it is kept while there is room, until it is measured a second time.
        archive.measure(&keyed("b"), Niche(1), 0.0, 3);
        assert_eq!(archive.size(), (1, 1));
        archive.measure(&keyed("b"), Niche(1), 0.0, 4);
        assert_eq!(archive.size(), (0, 0));
        assert_eq!(archive.draw("d", |_| true, &mut rng(0)), None);
    }

    #[test]
    fn a_full_archive_lets_its_worst_problem_go() {
        let mut archive = Archive::default();
        for number in 0..=MAX_PROBLEMS {
            let solve_rate = if number == 77 { 0.125 } else { 0.5 };
            archive.measure(&keyed(&number.to_string()), Niche(number as u64), solve_rate, 0);
        }
        assert_eq!(archive.size(), (MAX_PROBLEMS, MAX_PROBLEMS));
        assert!(!archive.domains["d"].contains_key(&Niche(77)));
    }

    /// Eight problems in niche 1, of learnability 0.30 and 0.05 by turns, and one of 0.30 in niche 2. The niches weigh 0.175
    /// and 0.30; within niche 1, six of seven draws are of the four that teach most.
    #[test]
    fn draws_are_in_proportion_to_what_there_is_to_learn() {
        let mut archive = Archive::default();
        for number in 0..8 {
            archive.measure(&keyed(&number.to_string()), Niche(1), [0.5, 0.0][number % 2], 0);
        }
        archive.measure(&keyed("alone"), Niche(2), 0.5, 0);
        let mut counts = [0u32; 3];
        let mut rng = rng(0);
        for _ in 0..20_000 {
            let drawn = archive.draw("d", |_| true, &mut rng).unwrap();
            counts[drawn.problem.text.parse::<usize>().map_or(2, |number| number % 2)] += 1;
        }
        let expected = [0.175 / 0.475 * 6.0 / 7.0, 0.175 / 0.475 / 7.0, 0.3 / 0.475];
        for (count, expected) in counts.into_iter().zip(expected) {
            assert!((f64::from(count) / 20_000.0 - expected).abs() < 0.012, "{counts:?}, expected {expected:?}");
        }
        assert_eq!(archive.draw("d", |niche| niche.0 == 2, &mut rng).unwrap().problem.text, "alone");
        assert_eq!(archive.draw("d", |niche| niche.0 == 3, &mut rng), None);
        assert_eq!(archive.draw("other", |_| true, &mut rng), None);
        assert_eq!(archive.draw_again("other", |_| true, 0, &mut rng), None);
    }

    /// One problem was measured 99 steps ago and two at this step: a tenth of the draws goes by their ages, 100 : 1 : 1.
    #[test]
    fn what_was_measured_long_ago_is_posed_again() {
        let mut archive = Archive::default();
        archive.measure(&keyed("old"), Niche(1), 0.0, 0);
        archive.measure(&keyed("new"), Niche(1), 0.5, 99);
        archive.measure(&keyed("other"), Niche(2), 0.5, 99);
        let mut rng = rng(1);
        let num_old =
            (0..20_000).filter(|_| archive.draw_again("d", |_| true, 99, &mut rng).unwrap().problem.text == "old");
        let share = num_old.count() as f64 / 20_000.0;
        // Niche 1 weighs 0.175 of 0.475, and the problem a seventh of that.
        let expected = 0.9 * 0.175 / 0.475 / 7.0 + 0.1 * 100.0 / 102.0;
        assert!((share - expected).abs() < 0.01, "{share}, expected {expected}");
    }

    /// Draws depend on the order of the archive, which a checkpoint keeps, and on the generator.
    #[test]
    fn draws_are_the_same_after_a_checkpoint() {
        let mut archive = Archive::default();
        for number in 0..400u64 {
            archive.measure(
                &keyed(&number.to_string()),
                Niche(number * 7 % 31),
                (number % 9) as f64 / 8.0,
                number / 10,
            );
        }
        let loaded: Archive = proto::wire::decode(&proto::wire::encode(&archive)).unwrap();
        assert_eq!(loaded, archive);
        for index in 0..200 {
            let drawn = |archive: &Archive| archive.draw_again("d", |_| true, 50, &mut rng(index)).cloned();
            assert_eq!(drawn(&loaded), drawn(&archive));
        }
    }
}
