//! A pretrained model that answers through the actor's engine, and learns from its answers as a run does.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use actor::engine::{Engine, LoadedVersion};
use anyhow::{Context as _, Result, bail, ensure};
use domains::domain;
use language::text::{Constraint, TextOptions};
use language::{Episode, Language, Next, Room};
use learner::{Fold, Plans, References, State};
use policy::formats::Pretrained;
use policy::{Backend, ModelConfig, TrainingState, write_weights};
use proto::{
    Behavior, Difficulty, Digest, Group, LegalTokens, Niche, Problem, ProblemOrigin, Request, Sampling, ScoredGroup,
    Task, TaskId, TaskKind, TokenId, Verdict,
};
use tokio::sync::mpsc::UnboundedReceiver;

use super::Args;
use super::peer::Program;
use super::rounds::{Workload, block_operations, forward_operations};
use crate::pretrained::{self, NUM_EXAMPLES, model_of};
use crate::run_config;

/// Answers to a problem; fewer if fewer are decoded in all.
const GROUP: usize = 8;

/// The domain whose problems are asked, and the level of their ladder.
const DOMAIN: &str = "countdown";
const LEVEL: u32 = 2;

const NO_MODEL: &str = "--model: expected a pretrained model (a folder with config.json, a GGUF file, or a name from `autodidact model get`)";

fn path_of(named: &Path) -> Result<PathBuf> {
    model_of(named)?.with_context(|| format!("{NO_MODEL}, found none at {}", named.display()))
}

/// Answers of a fixed number of tokens to prompts of a run.
pub(super) struct Answering {
    player: Player,
    tasks: Vec<Task>,
    version: LoadedVersion,
    num_tokens: usize,
    peers: Vec<Program>,
}

impl Answering {
    pub(super) fn new(args: &Args, model: &Path) -> Result<Answering> {
        let group = args.batch.min(GROUP);
        ensure!(
            args.batch.is_multiple_of(group),
            "batch: expected up to {GROUP}, or a multiple of it, got {}",
            args.batch
        );
        let pretrained = Pretrained::open(&path_of(model)?)?;
        let options = TextOptions {
            max_reply_tokens: args.answer_tokens as u32,
            num_examples: NUM_EXAMPLES,
            constraint: Constraint::None,
        };
        let language = Arc::new(Endless(Arc::new(pretrained::language(&pretrained, options)?)));
        let domain = domain(DOMAIN)?;
        let tasks: Vec<Task> = (0..args.batch / group)
            .map(|index| Task {
                id: TaskId { kind: TaskKind::Evaluate, batch: 0, index: index as u32 },
                seed: 0,
                weights: Digest::of_bytes(b""),
                policy_version: 0,
                free_running: false,
                request: Request::Solve {
                    problem: domain.ladder(LEVEL, 0, index as u64).problem,
                    origin: ProblemOrigin::Ladder,
                    has_key: false,
                },
                family: String::new(),
                num_rollouts: group as u32,
                sampling: Sampling { behavior: Behavior::Policy, temperature: 1.0 },
                max_tokens: args.answer_tokens as u32,
            })
            .collect();
        let prompts = prompts(language.as_ref(), &tasks)?;
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
        let config = config_with(pretrained.config(), longest + args.answer_tokens)?;
        let weights = Backend::Cpu.load(&config, &pretrained.load()?)?;
        let sequences: Vec<&Vec<TokenId>> =
            prompts.iter().flat_map(|prompt| std::iter::repeat_n(prompt, group)).collect();
        let input = Some(serde_json::to_string(&sequences)?);
        let shared = arguments(args, pretrained.path());
        let mut peers = vec![Program {
            name: "transformers",
            source: include_str!("../../tests/peers/generate.py"),
            arguments: shared.clone(),
            input: input.clone(),
        }];
        if args.batch == 1 {
            peers.push(Program {
                name: "llama.cpp",
                source: include_str!("../../tests/peers/llama.py"),
                arguments: shared,
                input,
            });
        }
        Ok(Answering {
            player: Player::start(language, args.num_threads(), args.batch),
            tasks,
            version: LoadedVersion { policy_version: 0, weights },
            num_tokens: args.batch * args.answer_tokens,
            peers,
        })
    }
}

impl Workload for Answering {
    fn run(&mut self) -> Result<usize> {
        self.player.play(&self.tasks, &self.version)?;
        Ok(self.num_tokens)
    }

    fn operations_per_unit(&self) -> f64 {
        // Prompt tokens are not counted: they are not newly generated.
        forward_operations(self.version.weights.config())
    }

    fn peers(&self) -> &[Program] {
        &self.peers
    }
}

/// Steps of a run that trains all weights with GRPO: answers to some problems, one update, and publishing of the weights.
pub(super) struct Learning {
    player: Player,
    language: Arc<Endless>,
    fold: Fold,
    version: LoadedVersion,
    operations_per_answer: f64,
    peers: Vec<Program>,
}

impl Learning {
    pub(super) fn new(args: &Args, model: &Path) -> Result<Learning> {
        ensure!(
            args.batch.is_multiple_of(GROUP),
            "batch: expected a multiple of {GROUP}, the answers to a problem, got {}",
            args.batch
        );
        let num_problems = args.batch / GROUP;
        let path = path_of(model)?;
        let quoted = |text: &Path| toml::Value::from(text.display().to_string());
        // Rewards alternate, so every answer has an advantage.
        let overrides = [
            format!("model.base={}", quoted(&path)),
            format!("model.max_positions={}", Pretrained::open(&path)?.config().max_positions.min(MAX_POSITIONS)),
            format!("language.examples={NUM_EXAMPLES}"),
            "language.constrain=none".to_owned(),
            format!("batch.num_tasks={num_problems}"),
            format!("batch.num_rollouts={GROUP}"),
            format!("actor.max_answer_tokens={}", args.answer_tokens),
            format!("domains=[{{ name = \"{DOMAIN}\", share = 1.0, levels = [{{ level = {LEVEL}, weight = 1.0 }}] }}]"),
            "learner.policy_gradient={ kind = \"grpo\", weight = 1.0, clip_low = 0.2, clip_high = 0.2, entropy_bonus = 0.0, \
             updates_per_step = 1, cross_entropy = false }"
                .to_owned(),
            format!("learner.learning_rate={LEARNING_RATE}"),
            "learner.beta2=0.999".to_owned(),
            "exams.names=[]".to_owned(),
            "schedule.num_steps=100000".to_owned(),
            "schedule.warmup_steps=0".to_owned(),
        ];
        let config = run_config::resolve(Some(Path::new("smollm2")), &overrides, &[])?;
        let Some(base) = &config.base else { bail!("{NO_MODEL}, got none") };
        let model = config.run.model.clone();
        let training = TrainingState::from_weights(&model, base.pretrained.load()?);
        let weights = Backend::Cpu.load(&model, &training.weights)?;
        let mut fold = Fold::new(
            config.run.clone(),
            config.sources(),
            &Backend::Cpu,
            args.num_threads(),
            (State::initial(), training),
            Plans::default(),
            References::default(),
        )?;
        let language = Arc::new(Endless(config.language()));
        let prompts = prompts(language.as_ref(), &planned(&mut fold))?;
        let arguments = arguments(args, base.pretrained.path());
        let settings =
            ["--answers".to_owned(), GROUP.to_string(), "--learning-rate".to_owned(), LEARNING_RATE.to_string()];
        let num_tokens = (args.batch * args.answer_tokens) as f64;
        let num_rows = num_tokens + prompts.iter().map(Vec::len).sum::<usize>() as f64;
        // One forward pass in play and another in training, and two products in the backward pass. The head is needed after the tokens
        // that predict an answer's.
        let head = forward_operations(&model) - block_operations(&model);
        Ok(Learning {
            player: Player::start(language.clone(), args.num_threads(), args.batch),
            language,
            fold,
            version: LoadedVersion { policy_version: 0, weights },
            operations_per_answer: 4.0 * (num_rows * block_operations(&model) + num_tokens * head) / args.batch as f64,
            peers: vec![Program {
                name: "TRL",
                source: include_str!("../../tests/peers/grpo.py"),
                arguments: arguments.into_iter().chain(settings).collect(),
                input: Some(serde_json::to_string(&prompts)?),
            }],
        })
    }
}

/// Of the peer too.
const LEARNING_RATE: f64 = 1e-6;

/// Of a run here: more than its prompts and answers take.
const MAX_POSITIONS: usize = 1024;

impl Workload for Learning {
    /// Runs one step as actor, verifier and learner do. Only the verdicts are made up.
    fn run(&mut self) -> Result<usize> {
        let tasks = planned(&mut self.fold);
        let groups = self.player.play(&tasks, &self.version)?;
        let mut num_answers = 0;
        let mut scored = Vec::new();
        for group in groups {
            let mut group: ScoredGroup = verifier::score(self.language.as_ref(), group, None)?;
            for (index, verdict) in group.verdicts.iter_mut().enumerate() {
                *verdict = if index % 2 == 0 { Verdict::Correct } else { Verdict::Incorrect };
            }
            num_answers += group.verdicts.len();
            scored.push(group);
        }
        let report = self.fold.fold(&scored, None)?;
        let trained = report.policy_gradient.as_ref().map_or(0, |report| report.num_rollouts as usize);
        ensure!(trained == num_answers, "expected an update on {num_answers} answers, got one on {trained}");
        let trainer = self.fold.trainer();
        let bytes = write_weights(&self.fold.config().model, &[("", &*trainer.weights()?)]);
        let weights = actor::load(report.weights_digest, &bytes, &Backend::Cpu)?;
        self.version = LoadedVersion { policy_version: report.step, weights };
        Ok(num_answers)
    }

    fn unit(&self) -> &'static str {
        "answers"
    }

    fn operations_per_unit(&self) -> f64 {
        self.operations_per_answer
    }

    fn peers(&self) -> &[Program] {
        &self.peers
    }
}

/// Plans the next batch and returns its tasks.
fn planned(fold: &mut Fold) -> Vec<Task> {
    fold.plan();
    fold.planned().iter().map(|planned| planned.task.clone()).collect()
}

/// Returns the shape of a network for sequences of so many tokens.
fn config_with(config: &ModelConfig, num_positions: usize) -> Result<ModelConfig> {
    let longest = config.max_positions;
    ensure!(
        num_positions <= longest,
        "--answer-tokens: expected up to {longest} positions in all, got {num_positions}"
    );
    Ok(ModelConfig { max_positions: num_positions, ..config.clone() })
}

/// Returns the prompts of tasks.
fn prompts(language: &dyn Language, tasks: &[Task]) -> Result<Vec<Vec<TokenId>>> {
    tasks.iter().map(|task| Ok(language.open(&task.request)?.prompt().to_vec())).collect()
}

/// Returns the arguments of the peers of this module. They read prompts from their input: JSON lists of tokens, one for each sequence
/// or problem.
fn arguments(args: &Args, model: &Path) -> Vec<String> {
    let numbers = [("threads", args.num_threads()), ("answer-tokens", args.answer_tokens)];
    let numbers = numbers.iter().flat_map(|(name, number)| [format!("--{name}"), number.to_string()]);
    ["--model".to_owned(), model.display().to_string()].into_iter().chain(numbers).collect()
}

/// An engine that plays tasks.
struct Player {
    engine: Engine,
    groups: UnboundedReceiver<Result<Group, actor::Error>>,
}

impl Player {
    fn start(language: Arc<Endless>, num_threads: usize, num_slots: usize) -> Player {
        let (engine, groups) = Engine::start(actor::Config { backend: Backend::Cpu, num_threads, num_slots }, language);
        Player { engine, groups }
    }

    /// Returns the groups in the order of their tasks.
    fn play(&mut self, tasks: &[Task], version: &LoadedVersion) -> Result<Vec<Group>> {
        for task in tasks {
            self.engine.submit(task.clone(), version.clone())?;
        }
        let next = |_: &Task| Ok(self.groups.blocking_recv().context("the engine stopped early")??);
        let mut groups: Vec<Group> = tasks.iter().map(next).collect::<Result<_>>()?;
        groups.sort_by_key(|group| group.task.id.index);
        Ok(groups)
    }
}

/// A language whose answers do not end by themselves: every answer takes all its tokens.
struct Endless(Arc<dyn Language>);

struct EndlessEpisode {
    begun: Box<dyn Episode>,
    answer: Vec<TokenId>,
    vocabulary_size: usize,
}

impl Language for Endless {
    fn vocabulary_size(&self) -> usize {
        self.0.vocabulary_size()
    }

    fn token_name(&self, token: TokenId) -> String {
        self.0.token_name(token)
    }

    fn open(&self, request: &Request) -> Result<Box<dyn Episode>, language::Error> {
        let (begun, vocabulary_size) = (self.0.open(request)?, self.vocabulary_size());
        Ok(Box::new(EndlessEpisode { begun, answer: Vec::new(), vocabulary_size }))
    }

    fn propose_prompt(
        &self,
        domain: &str,
        niche: Niche,
        difficulty: Difficulty,
    ) -> Result<Vec<TokenId>, language::Error> {
        self.0.propose_prompt(domain, niche, difficulty)
    }

    fn room(&self, problem: &Problem) -> Result<Room, language::Error> {
        self.0.room(problem)
    }

    fn proposal_room(&self, domain: &str, niche: Niche) -> Result<Room, language::Error> {
        self.0.proposal_room(domain, niche)
    }

    fn text(&self, request: &Request, answer: &[TokenId]) -> Result<Option<String>, language::Error> {
        self.0.text(request, answer)
    }

    fn spell(&self, problem: &Problem, answer: &str) -> Result<Option<Vec<TokenId>>, language::Error> {
        self.0.spell(problem, answer)
    }

    fn show(&self, domain: &str, answer: &[TokenId]) -> String {
        self.0.show(domain, answer)
    }
}

impl Episode for EndlessEpisode {
    fn prompt(&self) -> &[TokenId] {
        self.begun.prompt()
    }

    fn next(&self) -> Next {
        Next::Choice(LegalTokens::Any)
    }

    fn push(&mut self, token: TokenId) -> bool {
        let is_token = (token as usize) < self.vocabulary_size;
        if is_token {
            self.answer.push(token);
        }
        is_token
    }

    fn fork(&self) -> Box<dyn Episode> {
        let (begun, answer) = (self.begun.fork(), self.answer.clone());
        Box::new(EndlessEpisode { begun, answer, vocabulary_size: self.vocabulary_size })
    }

    fn state_hash(&self) -> Digest {
        Digest::of(&(self.begun.state_hash(), &self.answer))
    }

    fn check(&self) -> Option<Verdict> {
        None
    }
}
