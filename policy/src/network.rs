//! The network on the CPU: forward and backward over packed rows, by hand.
//!
//! Sequences are taken a few at a time, so that the activations stay in the cache; gradients go on summing where the last
//! chunk stopped, so that the size of a chunk changes no bit. Candle's autograd computes the same ([`crate::reference`]);
//! it allocates every intermediate, clears and re-adds every gradient, and brings a thread pool of its own.

use proto::{ActionMask, Token};

use crate::Params;
use crate::kernels::{
    MatrixView, PackedMatrix, Start, add, attention_backward, attention_forward, matmul, rms_norm, rms_norm_backward,
    swiglu, swiglu_backward,
};
use crate::model::{Scores, Sequence};
use crate::objective::{Objective, Slopes};
use crate::packed::{Linear, PackedWeights};
use crate::sampler::{masked_entropy, masked_entropy_backward, masked_logprob, masked_logprob_backward};

/// Rows that are computed together: about what fits the second-level cache for small networks.
const CHUNK_ROWS: usize = 256;

/// Scores all chosen tokens and, given objectives of the sequences, adds the gradient of their loss to `gradients`.
pub(crate) fn run(
    network: &PackedWeights,
    sequences: &[&Sequence],
    mut backward: Option<(&[Objective], &mut Params)>,
) -> Scores {
    let mut scores = Scores::default();
    let mut workspace = Workspace::default();
    let mut first = 0;
    while first < sequences.len() {
        let mut last = first + 1;
        let mut num_rows = sequences[first].tokens.len();
        while last < sequences.len() && num_rows + sequences[last].tokens.len() <= CHUNK_ROWS {
            num_rows += sequences[last].tokens.len();
            last += 1;
        }
        let chunk = Chunk::new(&sequences[first..last]);
        workspace.forward(network, &chunk);
        let rows = || chunk.choices.iter().zip(workspace.logits.chunks_exact(network.config.vocabulary_size));
        let logprobs: Vec<f32> = rows().map(|((target, mask), logits)| masked_logprob(logits, mask, *target)).collect();
        if let Some((objectives, gradients)) = &mut backward {
            let slopes = slopes(&sequences[first..last], &objectives[first..last], &logprobs);
            scores.entropies.extend(
                rows()
                    .zip(&slopes)
                    .map(|(((_, mask), logits), slopes)| slopes.entropy.map_or(0.0, |_| masked_entropy(logits, mask))),
            );
            workspace.backward(network, &chunk, &slopes, gradients);
        }
        scores.logprobs.extend(logprobs);
        first = last;
    }
    scores
}

/// Differentiates the loss by the log-probabilities and entropies of a chunk's chosen tokens.
fn slopes(sequences: &[&Sequence], objectives: &[Objective], logprobs: &[f32]) -> Vec<Slopes> {
    let tokens = sequences.iter().zip(objectives);
    let tokens =
        tokens.flat_map(|(sequence, objective)| (0..sequence.chosen.len()).map(move |index| (objective, index)));
    tokens.zip(logprobs).map(|((objective, index), logprob)| objective.slopes(index, *logprob)).collect()
}

/// Some sequences, as rows.
struct Chunk {
    tokens: Vec<Token>,
    lengths: Vec<usize>,
    /// Rows that predict chosen tokens.
    chosen_rows: Vec<usize>,
    choices: Vec<(Token, ActionMask)>,
}

impl Chunk {
    fn new(sequences: &[&Sequence]) -> Chunk {
        let mut chunk = Chunk { tokens: Vec::new(), lengths: Vec::new(), chosen_rows: Vec::new(), choices: Vec::new() };
        for sequence in sequences {
            for chosen in &sequence.chosen {
                chunk.chosen_rows.push(chunk.tokens.len() + chosen.row);
                chunk.choices.push((chosen.target, chosen.mask));
            }
            chunk.tokens.extend(&sequence.tokens);
            chunk.lengths.push(sequence.tokens.len());
        }
        chunk
    }
}

/// What a block keeps for its backward pass; all `[N, ...]`.
#[derive(Default)]
struct Activations {
    input: Vec<f32>,
    qkv: Vec<f32>,
    attended: Vec<f32>,
    middle: Vec<f32>,
    gate_up: Vec<f32>,
}

/// Buffers, kept from chunk to chunk.
#[derive(Default)]
struct Workspace {
    layers: Vec<Activations>,
    x: Vec<f32>,
    normed: Vec<f32>,
    gated: Vec<f32>,
    /// `[M, D]`
    chosen: Vec<f32>,
    chosen_normed: Vec<f32>,
    /// `[M, V]`
    logits: Vec<f32>,
    grad: Grad,
}

#[derive(Default)]
struct Grad {
    x: Vec<f32>,
    branch: Vec<f32>,
    normed: Vec<f32>,
    qkv: Vec<f32>,
    attended: Vec<f32>,
    gate_up: Vec<f32>,
    gated: Vec<f32>,
    logits: Vec<f32>,
    chosen: Vec<f32>,
    chosen_normed: Vec<f32>,
}

impl Workspace {
    fn forward(&mut self, network: &PackedWeights, chunk: &Chunk) {
        let width = network.config.d_model;
        self.layers.resize_with(network.layers.len(), Activations::default);
        self.x.clear();
        for token in &chunk.tokens {
            let start = usize::from(*token) * width;
            self.x.extend_from_slice(&network.embed[start..start + width]);
        }
        for (layer, kept) in network.layers.iter().zip(&mut self.layers) {
            kept.input.clone_from(&self.x);
            normalise(&self.x, &layer.attention_norm, &mut self.normed);
            linear(&self.normed, &layer.qkv.forward, &mut kept.qkv);
            kept.attended.resize(self.x.len(), 0.0);
            attention_forward(network.shape, &network.rotary, &chunk.lengths, &kept.qkv, &mut kept.attended);
            linear(&kept.attended, &layer.out.forward, &mut self.normed);
            add(&mut self.x, &self.normed);
            kept.middle.clone_from(&self.x);
            normalise(&self.x, &layer.mlp_norm, &mut self.normed);
            linear(&self.normed, &layer.gate_up.forward, &mut kept.gate_up);
            self.gated.resize(kept.gate_up.len() / 2, 0.0);
            swiglu(&kept.gate_up, &mut self.gated, network.config.ff_dim);
            linear(&self.gated, &layer.down.forward, &mut self.normed);
            add(&mut self.x, &self.normed);
        }
        self.chosen.clear();
        for row in &chunk.chosen_rows {
            self.chosen.extend_from_slice(&self.x[row * width..(row + 1) * width]);
        }
        normalise(&self.chosen, &network.norm, &mut self.chosen_normed);
        linear(&self.chosen_normed, &network.head.forward, &mut self.logits);
    }

    fn backward(&mut self, network: &PackedWeights, chunk: &Chunk, slopes: &[Slopes], gradients: &mut Params) {
        let width = network.config.d_model;
        let vocabulary = network.config.vocabulary_size;
        let mut tensors = gradients.tensors.iter_mut().rev();
        let mut next = || tensors.next().expect("gradients have the config's tensors");
        let grad = &mut self.grad;
        zeros(&mut grad.logits, self.logits.len());
        let rows = self.logits.chunks_exact(vocabulary).zip(grad.logits.chunks_exact_mut(vocabulary));
        for (((logits, grad), (target, mask)), slopes) in rows.zip(&chunk.choices).zip(slopes) {
            masked_logprob_backward(logits, mask, *target, slopes.logprob, grad);
            if let Some(slope) = slopes.entropy {
                masked_entropy_backward(logits, mask, slope, grad);
            }
        }
        linear_backward(&self.chosen_normed, &network.head, &grad.logits, next(), &mut grad.chosen_normed);
        zeros(&mut grad.chosen, self.chosen.len());
        rms_norm_backward(&self.chosen, &network.norm, &grad.chosen_normed, &mut grad.chosen, next());
        zeros(&mut grad.x, self.x.len());
        for (row, chosen) in chunk.chosen_rows.iter().zip(grad.chosen.chunks_exact(width)) {
            add(&mut grad.x[row * width..(row + 1) * width], chosen);
        }
        for (layer, kept) in network.layers.iter().zip(&self.layers).rev() {
            let (down, gate_up, mlp_norm) = (next(), next(), next());
            let (out, qkv, attention_norm) = (next(), next(), next());
            self.gated.resize(kept.gate_up.len() / 2, 0.0);
            swiglu(&kept.gate_up, &mut self.gated, network.config.ff_dim);
            linear_backward(&self.gated, &layer.down, &grad.x, down, &mut grad.gated);
            grad.gate_up.resize(kept.gate_up.len(), 0.0);
            swiglu_backward(&kept.gate_up, &grad.gated, &mut grad.gate_up, network.config.ff_dim);
            normalise(&kept.middle, &layer.mlp_norm, &mut self.normed);
            linear_backward(&self.normed, &layer.gate_up, &grad.gate_up, gate_up, &mut grad.normed);
            residual_backward(&kept.middle, &layer.mlp_norm, grad, mlp_norm);

            linear_backward(&kept.attended, &layer.out, &grad.x, out, &mut grad.attended);
            grad.qkv.resize(kept.qkv.len(), 0.0);
            let lengths = &chunk.lengths;
            attention_backward(network.shape, &network.rotary, lengths, &kept.qkv, &grad.attended, &mut grad.qkv);
            normalise(&kept.input, &layer.attention_norm, &mut self.normed);
            linear_backward(&self.normed, &layer.qkv, &grad.qkv, qkv, &mut grad.normed);
            residual_backward(&kept.input, &layer.attention_norm, grad, attention_norm);
        }
        let embed = next();
        for (token, row) in chunk.tokens.iter().zip(grad.x.chunks_exact(width)) {
            let start = usize::from(*token) * width;
            add(&mut embed[start..start + width], row);
        }
    }
}

fn zeros(buffer: &mut Vec<f32>, len: usize) {
    buffer.clear();
    buffer.resize(len, 0.0);
}

fn normalise(x: &[f32], weight: &[f32], out: &mut Vec<f32>) {
    out.resize(x.len(), 0.0);
    rms_norm(x, weight, out);
}

fn linear(x: &[f32], weight: &PackedMatrix, out: &mut Vec<f32>) {
    let inputs = weight.num_rows();
    let num_rows = x.len() / inputs;
    out.resize(num_rows * weight.num_columns(), 0.0);
    matmul(MatrixView::row_major(x, inputs), num_rows, weight, Start::Zero, out);
}

/// Adds `x^T grad_out` to the weight's gradient and writes `grad_out weight^T`.
fn linear_backward(x: &[f32], weight: &Linear, grad_out: &[f32], grad_weight: &mut [f32], grad_x: &mut Vec<f32>) {
    let (inputs, outputs) = (weight.forward.num_rows(), weight.forward.num_columns());
    let num_rows = grad_out.len() / outputs;
    let transposed = weight.transposed.as_ref().expect("packed for training");
    linear(grad_out, transposed, grad_x);
    let grad_out = PackedMatrix::new(MatrixView::row_major(grad_out, outputs), num_rows, outputs);
    let x = MatrixView::row_major(x, inputs).transposed();
    matmul(x, inputs, &grad_out, Start::Out, grad_weight);
}

/// Takes the gradient of a block's normalised input back through the norm, and adds it to the residual stream's.
fn residual_backward(x: &[f32], weight: &[f32], grad: &mut Grad, grad_weight: &mut [f32]) {
    grad.branch.resize(x.len(), 0.0);
    rms_norm_backward(x, weight, &grad.normed, &mut grad.branch, grad_weight);
    add(&mut grad.x, &grad.branch);
}
