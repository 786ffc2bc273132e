//! Records of version 5, in which groups have 16-bit tokens and sets of 256 tokens, and a device is one of two. They are read for
//! inspection only: nothing is computed from them.

use std::collections::BTreeMap;

use policy::{Device, Numerics};
use proto::wire::Format;
use proto::{
    BalanceKey, Choices, Digest, KeyedProblem, LabelOrigin, Legal, Niche, ProblemOrigin, StopReason, Task, TaskId,
    TokenId, TokenSet, Verdict,
};
use serde::{Deserialize, Serialize};

use super::{BanRecord, EvalRecord, Known, StepRecord};
use crate::{BuildId, Control};

pub(super) const FORMAT: Format = Format { name: "journal", version: 5 };

#[derive(Serialize, Deserialize)]
pub(super) enum Record {
    Manifest(Manifest),
    Group(GroupRecord),
    Eval(EvalRecord),
    Step(StepRecord),
    Control(Control),
    Ban(BanRecord),
    Dispute(TaskId),
    Opening(Box<Opening>),
}

#[derive(Serialize, Deserialize)]
pub(super) struct Opening {
    manifest: Manifest,
    known: Known,
}

#[derive(Serialize, Deserialize)]
pub(super) struct Manifest {
    config: Digest,
    build: BuildId,
    verifiers: BTreeMap<String, String>,
    exams: BTreeMap<String, Digest>,
    numerics: OldNumerics,
    reproducible: bool,
}

#[derive(Serialize, Deserialize)]
struct OldNumerics {
    kernels: String,
    device: OldDevice,
    dtype: String,
    pass_digest: Option<Digest>,
}

#[derive(Serialize, Deserialize)]
enum OldDevice {
    Cpu,
    Cuda,
}

#[derive(Serialize, Deserialize)]
pub(super) struct GroupRecord {
    played_by: String,
    scored: ScoredGroup,
}

#[derive(Serialize, Deserialize)]
struct ScoredGroup {
    group: Group,
    prompt: Vec<u16>,
    niche: Niche,
    balance_key: BalanceKey,
    verdicts: Vec<Verdict>,
    example_masks: Vec<Mask>,
    examples: Vec<Example>,
    proposals: Vec<Proposal>,
}

#[derive(Serialize, Deserialize)]
struct Group {
    task: Task,
    masks: Vec<Mask>,
    rollouts: Vec<Rollout>,
}

#[derive(Serialize, Deserialize)]
struct Rollout {
    tokens: Vec<u16>,
    choices: Vec<Choice>,
    stop: StopReason,
    versions: Vec<VersionSpan>,
    search: Option<SearchTrace>,
}

#[derive(Serialize, Deserialize)]
struct Choice {
    position: u16,
    mask: u16,
    logprob: f32,
}

#[derive(Serialize, Deserialize)]
struct VersionSpan {
    first_token: u16,
    policy_version: u64,
}

/// Part of groups that no build has played.
#[derive(Serialize, Deserialize)]
struct SearchTrace {
    policy_targets: Vec<Vec<(u16, f32)>>,
    value_targets: Vec<f32>,
    num_simulations: u64,
}

#[derive(Serialize, Deserialize)]
struct Example {
    prompt: Vec<u16>,
    answer: Vec<u16>,
    choices: Vec<ExampleChoice>,
    problem_origin: ProblemOrigin,
    label_origin: LabelOrigin,
    balance_key: BalanceKey,
}

#[derive(Serialize, Deserialize)]
struct ExampleChoice {
    position: u16,
    mask: u16,
}

#[derive(Serialize, Deserialize)]
struct Proposal {
    rollout: u32,
    keyed: KeyedProblem,
    niche: Niche,
    choices: Vec<ExampleChoice>,
}

#[derive(Serialize, Deserialize)]
struct Mask([u64; 4]);

impl From<Record> for super::Record {
    fn from(record: Record) -> super::Record {
        match record {
            Record::Manifest(manifest) => super::Record::Manifest(manifest.into()),
            Record::Group(GroupRecord { played_by, scored }) => {
                let written_as = Some(Digest::of(&scored));
                super::Record::Group(super::GroupRecord { played_by, scored: scored.into(), written_as })
            }
            Record::Eval(eval) => super::Record::Eval(eval),
            Record::Step(step) => super::Record::Step(step),
            Record::Control(control) => super::Record::Control(control),
            Record::Ban(ban) => super::Record::Ban(ban),
            Record::Dispute(task) => super::Record::Dispute(task),
            Record::Opening(opening) => {
                let Opening { manifest, known } = *opening;
                super::Record::Opening(Box::new(super::Opening { manifest: manifest.into(), known }))
            }
        }
    }
}

impl From<Manifest> for crate::Manifest {
    fn from(manifest: Manifest) -> crate::Manifest {
        let Manifest { config, build, verifiers, exams, numerics, reproducible } = manifest;
        let OldNumerics { kernels, device, dtype, pass_digest } = numerics;
        let device = match device {
            OldDevice::Cpu => Device::Cpu,
            OldDevice::Cuda => Device::Cuda(0),
        };
        let numerics = Numerics { kernels, device, dtype, pass_digest };
        crate::Manifest { config, build, verifiers, exams, numerics, reproducible }
    }
}

impl From<ScoredGroup> for proto::ScoredGroup {
    fn from(scored: ScoredGroup) -> proto::ScoredGroup {
        let ScoredGroup { group, prompt, niche, balance_key, verdicts, example_masks, examples, proposals } = scored;
        let lengths: Vec<usize> = group.rollouts.iter().map(|rollout| rollout.tokens.len()).collect();
        let example = |example: Example| proto::Example {
            choices: choices(example.answer.len(), example.choices),
            prompt: tokens(example.prompt),
            answer: tokens(example.answer),
            problem_origin: example.problem_origin,
            label_origin: example.label_origin,
            balance_key: example.balance_key,
        };
        let proposal = |Proposal { rollout, keyed, niche, choices: of_niche }: Proposal| {
            let num_tokens = lengths.get(rollout as usize).copied().unwrap_or(0);
            proto::Proposal { rollout, keyed, niche, choices: choices(num_tokens, of_niche) }
        };
        proto::ScoredGroup {
            prompt: tokens(prompt),
            niche,
            balance_key,
            verdicts,
            example_sets: example_masks.into_iter().map(Into::into).collect(),
            examples: examples.into_iter().map(example).collect(),
            proposals: proposals.into_iter().map(proposal).collect(),
            group: proto::Group {
                task: group.task,
                sets: group.masks.into_iter().map(Into::into).collect(),
                rollouts: group.rollouts.into_iter().map(Into::into).collect(),
            },
        }
    }
}

impl From<Rollout> for proto::Rollout {
    fn from(Rollout { tokens: answer, choices: chosen, stop, versions, search: _ }: Rollout) -> proto::Rollout {
        let span = |VersionSpan { first_token, policy_version }| proto::VersionSpan {
            first_token: first_token.into(),
            policy_version,
        };
        proto::Rollout {
            logprobs: chosen.iter().map(|choice| choice.logprob).collect(),
            choices: choices(
                answer.len(),
                chosen.into_iter().map(|Choice { position, mask, .. }| ExampleChoice { position, mask }),
            ),
            tokens: tokens(answer),
            values: None,
            search: None,
            stop,
            versions: versions.into_iter().map(span).collect(),
        }
    }
}

impl From<Mask> for TokenSet {
    fn from(mask: Mask) -> TokenSet {
        (0..256).filter(|token| mask.0[*token as usize / 64] >> (token % 64) & 1 == 1).collect()
    }
}

fn tokens(tokens: Vec<u16>) -> Vec<TokenId> {
    tokens.into_iter().map(TokenId::from).collect()
}

fn choices(num_tokens: usize, choices: impl IntoIterator<Item = ExampleChoice>) -> Choices {
    let choice = |ExampleChoice { position, mask }| (usize::from(position), Legal::Set(mask.into()));
    Choices::new(num_tokens, choices.into_iter().map(choice))
}
