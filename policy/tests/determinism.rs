//! Results do not depend on what else is computed: the tests draw random shapes and compare bits.

use policy::cpu::kernels::{MatrixView, PackedMatrix, Part, Start, matmul, matmul_on, matmul_transposed, parts};
use policy::{
    Backend, ClippedSurrogate, CrossEntropy, Device, Division, Feed, Loss, LossBatch, ModelConfig, Numerics,
    OptimizerStep, Params, Policy, Sequence, ThreadPool, Trainer, TrainingState, Variant, masked_logprob,
};
use proptest::prelude::*;
use proto::{CounterRng, LegalTokens, Purpose, TokenId};
use pulp::Arch;

fn draws(len: usize, seed: u64) -> Vec<f32> {
    let mut rng = CounterRng::new(seed, Purpose::Init, 9, 9, 9);
    (0..len).map(|_| rng.unit_f64() as f32 - 0.5).collect()
}

/// Multiplies matrices in the documented order of additions, as plainly as possible.
fn matmul_by_definition(left: &[f32], right: &[f32], (m, k, n): (usize, usize, usize)) -> Vec<f32> {
    let element = |row: usize, column: usize| {
        (0..k).fold(0f32, |sum, index| left[row * k + index].mul_add(right[index * n + column], sum))
    };
    (0..m * n).map(|index| element(index / n, index % n)).collect()
}

fn instruction_sets() -> Vec<Arch> {
    let mut sets = vec![Arch::Scalar, Arch::new()];
    #[cfg(target_arch = "x86_64")]
    sets.extend(pulp::x86::V3::try_new().map(Arch::V3));
    sets
}

fn config() -> ModelConfig {
    config_with_heads(16)
}

fn config_with_heads(head_dim: usize) -> ModelConfig {
    ModelConfig {
        vocabulary_size: 40,
        max_positions: 80,
        d_model: 4 * head_dim,
        num_layers: 2,
        num_heads: 4,
        num_kv_heads: 2,
        ff_dim: 48,
        variant: Variant::default(),
        adapter: None,
    }
}

fn mask() -> LegalTokens {
    (0..40).filter(|token| token % 3 != 1).collect()
}

fn sequence(len: usize, seed: u64) -> Sequence {
    let mut rng = CounterRng::new(seed, Purpose::Ladder, len as u64, 0, 0);
    let tokens: Vec<TokenId> = (0..len).map(|_| 3 * rng.below(13) as TokenId).collect();
    Sequence::new(&tokens[..2], &tokens[2..], (0..len - 2).map(|position| (position, mask())))
}

fn trainer(config: &ModelConfig, seed: u64, division: Division) -> Box<dyn Trainer> {
    Backend::Cpu.trainer(config, TrainingState::initial(config, seed), division).unwrap()
}

const ONE_SHARD: Division = Division { num_shards: 1, num_threads: 1 };

fn policy(config: &ModelConfig, params: &Params, num_slots: usize) -> Box<dyn Policy> {
    Backend::Cpu.load(config, params).unwrap().policy(num_slots).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn matmul_has_the_bits_of_its_definition(
        m in 1usize..40,
        k in 1usize..600,
        n in prop_oneof![9 => 1usize..70, 1 => 510usize..1_100],
        seed: u64,
    ) {
        let (left, right) = (draws(m * k, seed), draws(k * n, seed ^ 1));
        let expected = matmul_by_definition(&left, &right, (m, k, n));
        let packed = PackedMatrix::new(MatrixView::row_major(&right, n), k, n);
        for set in instruction_sets() {
            let mut out = vec![f32::NAN; m * n];
            matmul_on(set, MatrixView::row_major(&left, k), m, &packed, Start::Zero, &mut out);
            prop_assert_eq!(&out, &expected, "{:?}", set);
        }
        for num_parts in [2, 3, 100] {
            let mut out = vec![f32::NAN; m * n];
            let parts = parts(MatrixView::row_major(&left, k), m, &packed, Start::Zero, num_parts, &mut out);
            parts.into_iter().rev().for_each(Part::run);
            prop_assert_eq!(&out, &expected, "{} parts", num_parts);
        }
        // The transposed views read the same matrices.
        let transpose = |x: &[f32], rows: usize, columns: usize| -> Vec<f32> {
            (0..x.len()).map(|index| x[index % rows * columns + index / rows]).collect()
        };
        let (left_t, right_t) = (transpose(&left, m, k), transpose(&right, k, n));
        let packed = PackedMatrix::new(MatrixView::row_major(&right_t, k).transposed(), k, n);
        let mut out = vec![f32::NAN; m * n];
        matmul(MatrixView::row_major(&left_t, m).transposed(), m, &packed, Start::Zero, &mut out);
        prop_assert_eq!(&out, &expected);
        // A matrix that is packed as it is multiplies as its transpose, and gives its columns back.
        let packed = PackedMatrix::new(MatrixView::row_major(&right_t, k), n, k);
        out.fill(f32::NAN);
        matmul_transposed(MatrixView::row_major(&left, k), m, &packed, &mut out);
        prop_assert_eq!(&out, &expected);
        let mut column = vec![f32::NAN; n];
        packed.copy_column(k - 1, &mut column);
        prop_assert_eq!(&column, &right[(k - 1) * n..]);
        // Accumulating two halves of k in order gives the bits of the whole.
        let half = k / 2;
        let part = |from: usize, to: usize| PackedMatrix::new(MatrixView::row_major(&right[from * n..], n), to - from, n);
        matmul(MatrixView::row_major(&left, k), m, &part(0, half), Start::Zero, &mut out);
        let view = MatrixView { data: &left[half..], row_stride: k, column_stride: 1 };
        matmul(view, m, &part(half, k), Start::Out, &mut out);
        prop_assert_eq!(out, expected);
    }

    /// Sequences have the same bits scored alone, scored together, and decoded token by token or in pieces beside others.
    #[test]
    fn logprobs_have_the_same_bits_everywhere(
        lengths in prop::collection::vec(3usize..78, 1..6),
        waits in prop::collection::vec(any::<bool>(), 8),
        head_dim in prop::sample::select(vec![16, 32, 64]),
        seed in 0u64..1000,
    ) {
        let config = config_with_heads(head_dim);
        let params = Params::init(&config, seed);
        let trainer = trainer(&config, seed, ONE_SHARD);
        let sequences: Vec<Sequence> =
            lengths.iter().enumerate().map(|(index, len)| sequence(*len, seed + index as u64)).collect();
        let together = trainer.logprobs(&sequences.iter().collect::<Vec<_>>()).unwrap();
        let alone: Vec<f32> =
            sequences.iter().flat_map(|sequence| trainer.logprobs(&[sequence]).unwrap()).collect();
        prop_assert_eq!(&together, &alone);
        let decoded = decode(&config, &params, &sequences, &waits);
        prop_assert_eq!(&together, &decoded);
    }
}

/// Answers to one prompt, with rows in common, have the scores of each alone. Other shards share other rows, and threads still
/// change no bit.
#[test]
fn answers_to_one_prompt_have_the_bits_of_each_alone() {
    for head_dim in [16, 32, 64] {
        let config = config_with_heads(head_dim);
        let sequences: Vec<Sequence> = (0..60)
            .map(|number| {
                // Prompts of four lengths that begin alike, and answers that do.
                let mut tokens = sequence(24 + number % 4, 7).tokens;
                tokens.extend(
                    (0..3 + number % 7).map(|position| 3 * ((number / 8 + position * (number % 2)) % 13) as TokenId),
                );
                Sequence::new(
                    &tokens[..20],
                    &tokens[20..],
                    (number % 3..tokens.len() - 20).map(|place| (place, mask())),
                )
            })
            .collect();
        let trainer_of = |division| trainer(&config, 5, division);
        let trainer = trainer_of(ONE_SHARD);
        let alone: Vec<f32> = sequences.iter().flat_map(|sequence| trainer.logprobs(&[sequence]).unwrap()).collect();
        assert_eq!(trainer.logprobs(&sequences.iter().collect::<Vec<_>>()).unwrap(), alone);
        let loss = CrossEntropy { weight: 0.01 };
        let mut batch = LossBatch::default();
        sequences.iter().for_each(|sequence| batch.push([sequence], &loss));
        let gradients = |num_shards, num_threads| {
            let mut trainer = trainer_of(Division { num_shards, num_threads });
            let scores = trainer.gradients(&batch).unwrap();
            assert_eq!(scores.logprobs, alone);
            trainer.step(&KEEPING).unwrap();
            trainer.export().unwrap().first.clone()
        };
        let in_shards = gradients(5, 1);
        assert!(gradients(5, 2) == in_shards && gradients(5, 3) == in_shards, "threads change the gradient");
        // A shard of one sequence shares nothing.
        let (shared, apart) = (gradients(1, 1), gradients(sequences.len(), 2));
        assert!(shared != apart, "nothing was shared");
        for (shared, apart) in shared.tensors.iter().zip(&apart.tensors) {
            let scale = apart.iter().fold(0f32, |max, slope| max.max(slope.abs()));
            assert!(scale > 0.0);
            assert!(shared.iter().zip(apart).all(|(shared, apart)| (shared - apart).abs() <= 3e-5 * scale));
        }
    }
}

/// A step whose first moment is the gradient.
const KEEPING: OptimizerStep = OptimizerStep {
    learning_rate: 1e-3,
    beta1: 0.0,
    beta2: 0.0,
    weight_decay: 0.0,
    max_grad_norm: f64::INFINITY,
    average_decay: 0.0,
};

/// Sequences have the same gradient beside enough sequences of zero weight to shift the chunk boundaries. Shards do not
/// change their scores, and threads do not change the gradient.
#[test]
fn gradients_have_the_same_bits_beside_others() {
    for variant in
        [Variant::default(), Variant { tied_head: true, qkv_bias: true, qk_norm: true, ..Variant::default() }]
    {
        expect_the_same_gradients(&ModelConfig { variant, ..config() });
    }
}

fn expect_the_same_gradients(config: &ModelConfig) {
    let rollout = |number: u64| {
        let sequence = sequence(5 + number as usize * 7 % 33, number);
        let loss = ClippedSurrogate {
            advantages: vec![[0.5, -0.5][number as usize % 2]; sequence.chosen.len()],
            behavior_logprobs: draws(sequence.chosen.len(), number).iter().map(|draw| draw - 3.0).collect(),
            proximal: draws(sequence.chosen.len(), number + 100).iter().map(|draw| draw + 0.5).collect(),
            clip_low: 0.2,
            clip_high: 0.28,
            entropy_bonus: 0.1,
            weight: 0.01,
        };
        (sequence, Box::new(loss) as Box<dyn Loss>)
    };
    let bystander =
        |number: u64| (sequence(11 + number as usize, number), Box::new(CrossEntropy { weight: 0.0 }) as Box<dyn Loss>);
    let gradients = |parts: Vec<(Sequence, Box<dyn Loss>)>, division| {
        let mut trainer = trainer(config, 5, division);
        let mut batch = LossBatch::default();
        parts.iter().for_each(|(sequence, loss)| batch.push([sequence], loss.as_ref()));
        let scores = trainer.gradients(&batch).unwrap();
        trainer.step(&KEEPING).unwrap();
        (scores, trainer.export().unwrap().into_owned())
    };
    let rollouts = || (0..20).map(rollout).collect::<Vec<_>>();
    let (scores, alone) = gradients(rollouts(), ONE_SHARD);
    assert!(alone.first.tensors.iter().all(|tensor| tensor.iter().any(|slope| *slope != 0.0)));
    let both = (0..20).flat_map(|number| [bystander(number), rollout(number)]).collect();
    let (_, beside) = gradients(both, ONE_SHARD);
    assert!(alone.first == beside.first, "the gradients differ");
    // The result depends on the order in which shards are added, not on the threads that compute them.
    let in_shards = |num_threads| gradients(rollouts(), Division { num_shards: 3, num_threads });
    let (scores_in_shards, one_thread) = in_shards(1);
    assert_eq!(scores_in_shards, scores);
    assert!(in_shards(3).1 == one_thread && in_shards(2).1 == one_thread, "threads change the gradient");
}

/// Feeds all sequences in parallel, some of them only in some rounds. Returns the log-probabilities of their choices.
fn decode(config: &ModelConfig, params: &Params, sequences: &[Sequence], waits: &[bool]) -> Vec<f32> {
    let mut policy = policy(config, params, sequences.len());
    let mut logprobs = vec![Vec::new(); sequences.len()];
    let mut fed = vec![0usize; sequences.len()];
    for round in 0.. {
        let mut feeds = Vec::new();
        for (slot, sequence) in sequences.iter().enumerate() {
            // The first piece is the prompt; a later piece must end where a choice is scored, so it is one token long
            // unless the sequence scores only its end.
            let piece = if fed[slot] == 0 { 2 } else { 1 };
            // A sequence never waits in one round of nine, so that the loop ends.
            let wait = waits.get((round + slot) % (waits.len() + 1)) == Some(&true);
            let end = (fed[slot] + piece).min(sequence.tokens.len());
            if end > fed[slot] && !wait {
                feeds.push(Feed { slot, tokens: &sequence.tokens[fed[slot]..end] });
            }
        }
        if feeds.is_empty() && fed.iter().zip(sequences).all(|(fed, sequence)| *fed == sequence.tokens.len()) {
            return logprobs.concat();
        }
        if feeds.is_empty() {
            continue;
        }
        policy.feed(&feeds).unwrap();
        for (feed, logits) in feeds.iter().zip(policy.logits().unwrap().chunks_exact(40)) {
            fed[feed.slot] += feed.tokens.len();
            let chosen = sequences[feed.slot].chosen.iter().find(|chosen| chosen.row + 1 == fed[feed.slot]);
            if let Some(chosen) = chosen {
                logprobs[feed.slot].push(masked_logprob(logits, &chosen.legal, chosen.target));
            }
        }
    }
    unreachable!("the loop ends when every sequence is fed")
}

/// Feeding several tokens at once gives the bits of feeding them one by one, whatever the slot held before.
#[test]
fn decoding_in_pieces_gives_the_same_bits() {
    let params = Params::init(&config(), 3);
    let tokens: Vec<TokenId> = (0..40).map(|index| index * 7 % 40).collect();
    let mut policy = policy(&config(), &params, 3);
    policy.feed(&[Feed { slot: 1, tokens: &tokens }]).unwrap();
    let whole = policy.logits().unwrap().to_vec();
    for piece in [1, 3, 16, 39] {
        policy.reset(1);
        for tokens in tokens.chunks(piece) {
            policy.feed(&[Feed { slot: 1, tokens }]).unwrap();
        }
        assert_eq!(*policy.logits().unwrap(), whole, "pieces of {piece}");
    }
}

/// Slots share what they begin with, in whatever order they are copied, shortened, emptied and continued.
#[test]
fn slots_that_begin_alike_have_the_bits_of_each_alone() {
    const NUM_SLOTS: usize = 5;
    let params = Params::init(&config(), 5);
    let (mut shared, mut alone) = (policy(&config(), &params, NUM_SLOTS), policy(&config(), &params, 1));
    let mut held = vec![Vec::<TokenId>::new(); NUM_SLOTS];
    let mut num_copied = 0;
    for step in 0..600 {
        let mut rng = CounterRng::new(6, Purpose::Init, step, 0, 0);
        let mut below = |limit: usize| rng.below(limit as u64) as usize;
        let (slot, other, choice) = (below(NUM_SLOTS), below(NUM_SLOTS), below(8));
        if choice == 0 {
            shared.reset(slot);
            held[slot].clear();
        } else if choice < 4 {
            let len = below(held[slot].len() + 1);
            shared.fork(slot, other, len).unwrap();
            held[other] = held[slot][..len].to_vec();
            num_copied += usize::from(slot != other && len > 16);
        } else {
            let mut slots = vec![slot, other];
            slots.dedup();
            let pieces = slots.into_iter().map(|slot| {
                let len = (1 + below(40)).min(80 - held[slot].len());
                (slot, (0..len).map(|_| below(40) as TokenId).collect::<Vec<_>>())
            });
            let pieces: Vec<_> = pieces.filter(|(_, tokens)| !tokens.is_empty()).collect();
            let feeds = pieces.iter().map(|(slot, tokens)| Feed { slot: *slot, tokens });
            shared.feed(&feeds.collect::<Vec<_>>()).unwrap();
            for ((slot, tokens), logits) in pieces.iter().zip(shared.logits().unwrap().chunks_exact(40)) {
                held[*slot].extend(tokens);
                alone.reset(0);
                alone.feed(&[Feed { slot: 0, tokens: &held[*slot] }]).unwrap();
                assert_eq!(logits, &*alone.logits().unwrap(), "slot {slot} after {step} steps");
            }
        }
    }
    assert!(num_copied > 50, "expected many copies, got {num_copied}");
}

/// A network that is large enough for threads to share its products.
#[test]
fn idle_threads_help_without_changing_a_bit() {
    let config = ModelConfig { vocabulary_size: 4_128, ff_dim: 2_048, ..config() };
    let weights = Backend::Cpu.load(&config, &Params::init(&config, 7)).unwrap();
    let tokens: Vec<TokenId> = (0..60).collect();
    let mut logits = Vec::new();
    for num_threads in [1, 2, 3, 7] {
        let pool = ThreadPool::new(num_threads);
        let play = || {
            let mut policy = weights.shared_policy(9, &pool).unwrap();
            policy.feed(&[Feed { slot: 8, tokens: &tokens }]).unwrap();
            let mut logits = policy.logits().unwrap().to_vec();
            for num_rows in [1, 3, 8] {
                let feeds: Vec<Feed<'_>> =
                    (0..num_rows).map(|slot| Feed { slot, tokens: &tokens[slot..=slot] }).collect();
                policy.feed(&feeds).unwrap();
                logits.extend_from_slice(&policy.logits().unwrap());
            }
            logits
        };
        // Two threads with work, of which one is helped.
        let played =
            std::thread::scope(|scope| [(); 2].map(|()| scope.spawn(play)).map(|thread| thread.join().unwrap()));
        logits.extend(played);
    }
    assert_eq!(logits[0].len(), 13 * config.vocabulary_size);
    assert!(logits.iter().all(|other| *other == logits[0]), "threads change a bit");
}

/// The fixed pass has the same hash on every machine. If it changes, every run changes, and the changelog must say so.
#[test]
fn numerics_are_fixed() {
    let numerics = Numerics::measure(Device::Cpu).unwrap();
    assert_eq!(numerics, Numerics::measure(Device::Cpu).unwrap());
    assert_eq!(numerics.pass_digest.unwrap().short(), "c5b2a37c959b");
}
