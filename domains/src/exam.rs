//! Frozen evaluation sets: rebuilt by one function, committed as files, excluded from all training.

use std::collections::{HashMap, HashSet};
use std::sync::LazyLock;

use proto::{Digest, Problem};

use crate::{Error, domain, registry};

/// Problems for live curves and tuning.
const DEV_SIZE: usize = 200;
/// Problems for the start and the end of a run.
const TEST_SIZE: usize = 1_000;

/// The name of an exam and the source of its problems.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExamSpec {
    /// Name of the exam.
    pub name: &'static str,
    /// Domain of its problems.
    pub domain: &'static str,
    /// Ladder level that its problems are modelled on; the highest one if they are a mix.
    pub level: u32,
}

/// A part of an exam.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Split {
    /// For live curves and tuning.
    Dev,
    /// For the start and the end of a run.
    Test,
}

/// A frozen evaluation set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exam {
    /// 200 problems.
    pub dev: Vec<Problem>,
    /// 1,000 problems.
    pub test: Vec<Problem>,
}

impl Exam {
    /// Returns one split.
    pub fn split(&self, split: Split) -> &[Problem] {
        match split {
            Split::Dev => &self.dev,
            Split::Test => &self.test,
        }
    }

    /// Hashes both splits in order.
    pub fn digest(&self) -> Digest {
        Digest::of(&(&self.dev, &self.test))
    }

    /// Draws the exam again from candidates in order of index: solvable, without repeats, the test split first.
    ///
    /// # Errors
    /// [`Error::UnknownDomain`] when the spec names no known domain.
    pub fn generate(spec: &ExamSpec) -> Result<Exam, Error> {
        let domain = domain(spec.domain)?;
        let exams = domain.exams().ok_or_else(|| Error::UnknownExam { got: spec.name.to_owned() })?;
        let mut seen = HashSet::new();
        let mut problems: Vec<Problem> = (0..)
            .filter_map(|index| exams.candidate(spec, index))
            .filter(|problem| seen.insert(domain.canonical_hash(problem)))
            .take(TEST_SIZE + DEV_SIZE)
            .collect();
        let dev = problems.split_off(TEST_SIZE);
        Ok(Exam { dev, test: problems })
    }

    /// Writes the exam as the content of its file: one problem per line, the test split first, compressed.
    ///
    /// # Errors
    /// [`Error::Problem`] when a problem is not in its language.
    pub fn to_file(&self) -> Result<Vec<u8>, Error> {
        let mut text = String::new();
        for problem in self.test.iter().chain(&self.dev) {
            text += &domain(&problem.domain)?.problem_to_json(problem)?.to_string();
            text.push('\n');
        }
        Ok(zstd::bulk::compress(text.as_bytes(), 19).expect("compressing to memory needs nothing but memory"))
    }

    fn from_file(bytes: &[u8]) -> Exam {
        let text = zstd::bulk::decompress(bytes, 1 << 24).expect("the file was committed compressed");
        let text = String::from_utf8(text).expect("the file was committed as UTF-8");
        let mut problems: Vec<Problem> = text
            .lines()
            .map(|line| {
                let json = serde_json::from_str(line).expect("the file was committed as JSON lines");
                crate::problem_from_json(&json).expect("the file was committed with legal problems")
            })
            .collect();
        let dev = problems.split_off(TEST_SIZE);
        Exam { dev, test: problems }
    }
}

/// Lists every exam.
pub fn exam_specs() -> Vec<&'static ExamSpec> {
    registry().iter().filter_map(|domain| domain.exams()).flat_map(|exams| exams.specs()).collect()
}

/// Returns an exam as committed.
///
/// # Errors
/// [`Error::UnknownExam`].
///
/// ```
/// let exam = domains::exam("countdown-4").unwrap();
/// assert_eq!((exam.dev.len(), exam.test.len()), (200, 1_000));
/// ```
pub fn exam(name: &str) -> Result<&'static Exam, Error> {
    EXAMS.get(name).ok_or_else(|| Error::UnknownExam { got: name.to_owned() })
}

/// Lists the exams that a learner trained on these domains can take.
pub fn exams_of<'a>(trained: impl IntoIterator<Item = &'a str>) -> Vec<&'static ExamSpec> {
    let known: HashSet<&str> = trained.into_iter().filter_map(|name| Some(domain(name).ok()?.exams()?.of())).collect();
    exam_specs().into_iter().filter(|spec| known.contains(spec.domain)).collect()
}

/// Returns the problems of an exam for a learner trained on these domains, in the variant on which it is trained.
///
/// # Errors
/// [`Error::UnknownExam`].
///
/// ```
/// let asked = |trained| domains::exam_problems("countdown-3", domains::Split::Dev, [trained]).unwrap()[0].domain.clone();
/// assert_eq!(asked("countdown"), "countdown");
/// assert_eq!(asked("countdown-no-calculator"), "countdown-no-calculator");
/// assert_eq!(asked("programs"), "countdown");
/// ```
pub fn exam_problems<'a>(
    name: &str,
    split: Split,
    trained: impl IntoIterator<Item = &'a str>,
) -> Result<Vec<Problem>, Error> {
    let mut problems = exam(name)?.split(split).to_vec();
    if let Some(variant) = trained_variant(&problems[0].domain, trained) {
        problems.iter_mut().for_each(|problem| problem.domain = variant.to_owned());
    }
    Ok(problems)
}

/// Returns the trained variant of a domain; `None` when the domain itself is trained, or no variant is.
pub fn trained_variant<'a>(name: &str, trained: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let trained: Vec<&str> = trained.into_iter().collect();
    let is_variant =
        |other: &&str| domain(other).is_ok_and(|domain| domain.exams().is_some_and(|exams| exams.of() == name));
    trained.iter().copied().find(is_variant).filter(|_| !trained.contains(&name))
}

/// Whether a canonical hash belongs to one of a domain's exam problems, in either split.
pub(crate) fn exam_contains(domain: &str, canonical_hash: &Digest) -> bool {
    EXAM_HASHES.get(domain).is_some_and(|hashes| hashes.contains(canonical_hash))
}

macro_rules! committed {
    ($($name:literal),*) => {
        [$(($name, &include_bytes!(concat!("../exams/", $name, ".jsonl.zst"))[..])),*]
    };
}

static EXAMS: LazyLock<HashMap<&'static str, Exam>> = LazyLock::new(|| {
    let committed = committed![
        "countdown-3",
        "countdown-4",
        "countdown-sos",
        "programs-deduction",
        "programs-abduction",
        "programs-induction",
        "programs-digits",
        "arithmetic-sum",
        "arithmetic-mixed",
        "comparison",
        "strings-reverse",
        "strings-mixed"
    ];
    committed.into_iter().map(|(name, bytes)| (name, Exam::from_file(bytes))).collect()
});

static EXAM_HASHES: LazyLock<HashMap<&'static str, HashSet<Digest>>> = LazyLock::new(|| {
    let mut by_domain: HashMap<&'static str, HashSet<Digest>> = HashMap::new();
    for domain in registry() {
        for spec in domain.exams().map_or(&[][..], |exams| exams.specs()) {
            let exam = &EXAMS[spec.name];
            let hashes = exam.dev.iter().chain(&exam.test).map(|problem| domain.canonical_hash(problem));
            by_domain.entry(spec.domain).or_default().extend(hashes);
        }
    }
    by_domain
});
