use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use policy::{Draw, Feed, Policy};
use proto::TokenId;

use super::Active;

/// The rollouts of a thread, and the tokens that its policy has read. A rollout begins with what some slot already holds of its
/// tokens, and reads only the rest.
pub(super) struct Slots {
    slots: Vec<Slot>,
    /// Rollouts that have no slot yet, the oldest first.
    #[expect(clippy::vec_box, reason = "they move to slots, which hold boxes")]
    waiting: Vec<Box<Active>>,
    num_active: usize,
    num_fed: Arc<AtomicU64>,
}

#[derive(Default)]
struct Slot {
    active: Option<Box<Active>>,
    /// What the slot of the policy holds, also after its rollout has ended.
    tokens: Vec<TokenId>,
    /// Index of the feed after which the next token is drawn.
    feed: usize,
}

/// The shortest prefix worth a copy, or a wait of one pass.
const MIN_SHARED: usize = 16;

impl Slots {
    /// Creates empty slots, which count the tokens that are fed.
    pub(super) fn new(num_slots: usize, num_fed: Arc<AtomicU64>) -> Slots {
        let slots = (0..num_slots).map(|_| Slot::default()).collect();
        Slots { slots, waiting: Vec::new(), num_active: 0, num_fed }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.num_active == 0
    }

    pub(super) fn is_full(&self) -> bool {
        self.num_active == self.slots.len()
    }

    /// Returns the rollouts that are not over.
    pub(super) fn rollouts(&self) -> impl Iterator<Item = &Active> {
        self.slots.iter().filter_map(|slot| slot.active.as_deref()).chain(self.waiting.iter().map(Box::as_ref))
    }

    /// Adds a rollout whose pending tokens are its whole sequence.
    pub(super) fn add(&mut self, active: Box<Active>) {
        self.num_active += 1;
        self.waiting.push(active);
    }

    /// Follows the policy, whose weights were replaced: no slot holds tokens, and every rollout reads its sequence again.
    pub(super) fn begin_again(&mut self, policy_version: u64) {
        // Rollouts that have waited come first, so that none waits forever, however often the weights change.
        self.waiting.extend(self.slots.iter_mut().filter_map(|slot| slot.active.take()));
        self.waiting.iter_mut().for_each(|active| active.go_on_with(policy_version));
        self.slots.iter_mut().for_each(|slot| slot.tokens.clear());
    }

    /// Feeds the pending tokens of every rollout that has a slot or gets one.
    pub(super) fn feed(&mut self, policy: &mut dyn Policy) -> Result<(), policy::Error> {
        let copies = self.begin_waiting(policy)?;
        let mut feeds = Vec::new();
        for (index, slot) in self.slots.iter_mut().enumerate() {
            // A rollout without pending tokens gets a copy.
            if let Some(active) = slot.active.as_ref().filter(|active| !active.pending.is_empty()) {
                slot.feed = feeds.len();
                slot.tokens.extend_from_slice(&active.pending);
                feeds.push(Feed { slot: index, tokens: &active.pending });
            }
        }
        policy.feed(&feeds)?;
        let num_fed: usize = feeds.iter().map(|feed| feed.tokens.len()).sum();
        self.num_fed.fetch_add(num_fed as u64, Ordering::Relaxed);
        for (from, to) in copies {
            let Slot { tokens, feed, .. } = &self.slots[from];
            let (tokens, feed) = (tokens.clone(), *feed);
            policy.fork(from, to, tokens.len())?;
            (self.slots[to].tokens, self.slots[to].feed) = (tokens, feed);
        }
        Ok(())
    }

    /// Returns the draws of the rollouts that were fed.
    pub(super) fn draws(&mut self) -> Vec<Draw<'_>> {
        self.slots.iter_mut().filter_map(|slot| Some(slot.active.as_mut()?.draw(slot.feed))).collect()
    }

    /// Appends the tokens that were drawn, in the order of the draws. Returns the rollouts that are over.
    pub(super) fn choose(&mut self, drawn: Vec<(TokenId, f32)>) -> Vec<Active> {
        let playing = self.slots.iter_mut().filter(|slot| slot.active.is_some());
        let over = playing.zip(drawn).filter_map(|(slot, (token, logprob))| {
            let is_over = slot.active.as_mut()?.choose(token, logprob);
            if is_over { slot.active.take().map(|active| *active) } else { None }
        });
        let over: Vec<Active> = over.collect();
        self.num_active -= over.len();
        over
    }

    /// Assigns slots to waiting rollouts, the oldest first, and copies what they share with others to their slots. A rollout that
    /// shares more with one that begins now goes on waiting, until that has been fed. Returns pairs of slots whose rollouts begin
    /// with the same tokens: the first is fed them, and the second gets a copy.
    fn begin_waiting(&mut self, policy: &mut dyn Policy) -> Result<Vec<(usize, usize)>, policy::Error> {
        let mut copies = Vec::new();
        // Slots that are fed the beginning of a rollout.
        let mut begun = Vec::<usize>::new();
        for mut active in std::mem::take(&mut self.waiting) {
            let free = self.slots.iter().position(|slot| slot.active.is_none()).expect("a slot for every rollout");
            if let Some(twin) = begun.iter().rfind(|begun| self.slots[**begun].sequence().eq(&active.pending)) {
                copies.push((*twin, free));
                active.pending.clear();
                self.slots[free].active = Some(active);
                continue;
            }
            // The last token is read in any case: the logits after it are needed.
            let prefix = active.pending.split_last().expect("a prompt has tokens").1;
            let (from, len) = self.longest_shared(prefix, free);
            let shares_more = |begun: &usize| num_shared(self.slots[*begun].sequence(), prefix) >= len + MIN_SHARED;
            if prefix.len() >= len + MIN_SHARED && begun.iter().any(shares_more) {
                self.waiting.push(active);
                continue;
            }
            let to = if self.slots[from].active.is_none() { from } else { free };
            policy.fork(from, to, len)?;
            self.slots[to].tokens = self.slots[from].tokens[..len].to_vec();
            active.pending.drain(..len);
            self.slots[to].active = Some(active);
            begun.push(to);
        }
        Ok(copies)
    }

    /// Returns the slot that holds most of the prefix, one without a rollout if there is a choice, and the length that it holds;
    /// nothing of the slot `free` if that is too little.
    fn longest_shared(&self, prefix: &[TokenId], free: usize) -> (usize, usize) {
        let (mut longest, mut from) = (0, free);
        if prefix.len() >= MIN_SHARED {
            let slots = || self.slots.iter().enumerate();
            let is_free = |(_, slot): &(usize, &Slot)| slot.active.is_none();
            for (index, slot) in slots().filter(is_free).chain(slots().filter(|slot| !is_free(slot))) {
                // Most slots that do not hold more differ at this token.
                if longest < prefix.len() && slot.tokens.get(longest) == Some(&prefix[longest]) {
                    let shared = num_shared(slot.tokens.iter(), prefix);
                    if shared > longest {
                        (longest, from) = (shared, index);
                    }
                }
            }
        }
        if longest >= MIN_SHARED { (from, longest) } else { (free, 0) }
    }
}

impl Slot {
    /// Returns the tokens that its rollout has read, or is about to read.
    fn sequence(&self) -> impl Iterator<Item = &TokenId> {
        self.tokens.iter().chain(self.active.iter().flat_map(|active| &active.pending))
    }
}

fn num_shared<'a>(left: impl Iterator<Item = &'a TokenId>, right: &[TokenId]) -> usize {
    left.zip(right).take_while(|(left, right)| left == right).count()
}
