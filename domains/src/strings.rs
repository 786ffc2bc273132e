//! Strings: words of letters to spell, reverse, sort and count in.
//!
//! A problem is `reverse d o g`, `sort d o g`, `spell d o g`, `count a in b a n a n a` or `position n in b a n a n a`: a word
//! of 2 to 16 letters from a to z. A position counts from 1, and is that of the letter's first occurrence. An answer is
//! letters with one space between every two, or a number.
//!
//! Letters are shown and written apart, because a token of a pretrained model may hold several letters of a word; a letter
//! after a space is a token of its own. Only `spell` shows the word itself.

use proto::{CounterRng, Digest, LadderLevel, Purpose, Verdict};
use serde_json::{Map, Value};

use crate::exam::ExamSpec;
use crate::json::{Fields, Refusal};
use crate::quiz::{QuizProblem, is_whole_number};
use crate::{Judged, quote};

const MAX_LETTERS: usize = 16;
/// Most letters of a word on the ladder.
const MAX_LADDER_LETTERS: usize = 8;

/// What to do with a word.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Exercise {
    task: Task,
    /// The letters, in ASCII.
    word: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Task {
    Spell,
    Reverse,
    Sort,
    Count(u8),
    /// The word has the letter.
    Position(u8),
}

impl QuizProblem for Exercise {
    const NAME: &'static str = "strings";
    const DESCRIPTION: &'static str = "spell, reverse, sort and count the letters of a word, in words";
    const LEVELS: &'static [LadderLevel] = &[
        LadderLevel { level: 1, description: "spell 3 to 5 letters" },
        LadderLevel { level: 2, description: "reverse 3 to 5 letters" },
        LadderLevel { level: 3, description: "sort 3 to 5 letters" },
        LadderLevel { level: 4, description: "count a letter among 4 to 8" },
        LadderLevel { level: 5, description: "find the position of a letter among 4 to 8" },
        LadderLevel { level: 6, description: "reverse 6 to 8 letters" },
        LadderLevel { level: 7, description: "sort 6 to 8 letters" },
    ];
    const EXAMS: &'static [ExamSpec] = &[
        ExamSpec { name: "strings-reverse", domain: Self::NAME, level: 2 },
        ExamSpec { name: "strings-mixed", domain: Self::NAME, level: 7 },
    ];
    const EXAMPLES: [(&'static str, &'static str); 3] =
        [("reverse c a t", "t a c"), ("sort d o g", "d g o"), ("count s in g l a s s", "2")];
    const FORM: &'static str = "a task and a word of 2 to 16 letters from a to z, such as \"reverse d o g\", \
                                \"sort dog\", \"spell dog\", \"count a in banana\" or, for a letter of the word, \
                                \"position n in banana\"";
    const FIELDS: &'static str = "domain, task, word and, for count and position, letter";

    fn parse(text: &str) -> Option<Exercise> {
        let mut words = text.split_ascii_whitespace();
        let name = words.next()?;
        let letter = if Task::has_letter(name) {
            let letter = words.next()?;
            words.next().filter(|word| *word == "in")?;
            Some(letter)
        } else {
            None
        };
        Exercise::new(Task::read(name, letter)?, words.collect::<String>().into_bytes())
    }

    fn from_fields(fields: &mut Fields<'_>) -> Result<Exercise, Refusal> {
        let name = fields.read("task", "spell, reverse, sort, count or position", |value| {
            value.as_str().filter(|name| Task::NAMES.contains(name)).map(str::to_owned)
        })?;
        let expected = "one letter from a to z";
        let task = if Task::has_letter(&name) {
            fields.read("letter", expected, |value| Task::read(&name, Some(value.as_str()?)))?
        } else {
            Task::read(&name, None).expect("a task that asks for no letter is its name")
        };
        let expected = match task {
            Task::Position(_) => "2 to 16 letters from a to z with the letter among them",
            _ => "2 to 16 letters from a to z",
        };
        fields.read("word", expected, |value| Exercise::new(task, value.as_str()?.as_bytes().to_vec()))
    }

    fn fields(&self) -> Map<String, Value> {
        let field = |name: &str, value: String| (name.to_owned(), Value::String(value));
        let mut fields = Map::from_iter([field("task", self.task.name().to_owned()), field("word", self.joined())]);
        fields.extend(self.task.letter().map(|letter| field("letter", letter.to_string())));
        fields
    }

    fn text(&self) -> String {
        let letter = self.task.letter().map_or(String::new(), |letter| format!(" {letter} in"));
        format!("{}{letter} {}", self.task.name(), apart(&self.word))
    }

    fn level(&self) -> u32 {
        match (self.task, self.word.len()) {
            (Task::Spell, 3..=5) => 1,
            (Task::Reverse, 3..=5) => 2,
            (Task::Sort, 3..=5) => 3,
            (Task::Count(_), 4..=8) => 4,
            (Task::Position(_), 4..=8) => 5,
            (Task::Reverse, 6..=8) => 6,
            (Task::Sort, 6..=8) => 7,
            _ => 0,
        }
    }

    /// By the number of letters, and the answer if it is a number.
    fn kind(&self) -> u32 {
        let answer =
            if self.task.letter().is_some() { self.answer().parse().map_or(0, |number: u32| 1 + number) } else { 0 };
        32 * answer + self.word.len() as u32
    }

    fn describe_kind(kind: u32) -> String {
        let answer = if kind < 32 { String::new() } else { format!(" and the answer {}", kind / 32 - 1) };
        format!("of {} letters{answer}", kind % 32)
    }

    fn proposal_pattern(level: u32) -> String {
        let (shortest, longest) = num_letters(level);
        let word = format!("[a-z](?: [a-z]){{{},{}}}", shortest - 1, longest - 1);
        let task = match level {
            1 => "spell",
            2 | 6 => "reverse",
            4 => "count [a-z] in",
            5 => "position [a-z] in",
            _ => "sort",
        };
        format!("{task} {word}")
    }

    fn draw(level: u32, rng: &mut CounterRng) -> Option<Exercise> {
        let (shortest, longest) = num_letters(level);
        let num_letters = shortest + rng.below(longest - shortest + 1);
        // Of few letters, so that one of them may occur often.
        let counted = [(); 3].map(|()| letter(rng));
        let mut word: Vec<u8> = (0..num_letters).map(|_| letter(rng)).collect();
        if level == 4 {
            word.fill_with(|| counted[rng.below(3) as usize]);
        }
        let task = match level {
            1 => Task::Spell,
            2 | 6 => Task::Reverse,
            4 => Task::Count(counted[0]),
            5 => Task::Position(word[rng.below(num_letters) as usize]),
            _ => Task::Sort,
        };
        Exercise::new(task, word)
    }

    fn changed(&self, rng: &mut CounterRng) -> Option<Exercise> {
        let mut word = self.word.clone();
        word[rng.below(self.word.len() as u64) as usize] = letter(rng);
        Exercise::new(self.task, word)
    }

    fn exam_levels(exam: &ExamSpec) -> &'static [u32] {
        if exam.level == 2 { &[2] } else { &[3, 4, 5, 6, 7] }
    }

    fn answer(&self) -> String {
        let mut word = self.word.clone();
        match self.task {
            Task::Spell => {}
            Task::Reverse => word.reverse(),
            Task::Sort => word.sort_unstable(),
            Task::Count(letter) => return self.count(letter).to_string(),
            Task::Position(letter) => {
                let place = self.word.iter().position(|other| *other == letter);
                return (place.expect("the word has the letter") + 1).to_string();
            }
        }
        apart(&word)
    }

    fn judge(&self, answer: &str) -> Judged {
        let malformed =
            |expected: &str| Judged::because(Verdict::Malformed, format!("expected {expected}, got {}", quote(answer)));
        let is_number = self.task.letter().is_some();
        if answer == self.answer() {
            Judged::correct()
        } else if is_number && !is_whole_number(answer) {
            malformed("a number such as 2, in digits without a leading zero")
        } else if !is_number && letters(answer).is_none() {
            malformed("small letters with one space between every two, such as \"g o d\"")
        } else {
            let reason = match self.task {
                Task::Spell => "is another word",
                Task::Reverse => "is not the word backwards",
                Task::Sort => "is not the letters of the word from a to z",
                Task::Count(_) => "is not how often the letter occurs",
                Task::Position(_) => "is not where the letter is first",
            };
            Judged::because(Verdict::Incorrect, reason)
        }
    }

    /// For letters, a word whose answer they are. For a count, the next letters of the alphabet that occur so often; for a
    /// position, the letter there.
    fn solved_by(&self, answer: &str) -> Vec<Exercise> {
        let with_word = |word| Exercise::new(self.task, word);
        let solved = match self.task {
            Task::Spell => letters(answer).and_then(with_word),
            Task::Reverse => letters(answer).and_then(|word| with_word(word.into_iter().rev().collect())),
            Task::Sort => letters(answer).filter(|word| word.is_sorted()).and_then(|mut word| {
                let asked = Digest::of_bytes(format!("{} {answer}", self.text()).as_bytes());
                CounterRng::of_digest(&asked, Purpose::Execution).shuffle(&mut word);
                with_word(word)
            }),
            Task::Count(asked) => {
                let others = (1..26).map(|step| b'a' + (asked - b'a' + step) % 26);
                let tasks = others.map(Task::Count);
                return self.solved_instead(tasks, answer);
            }
            Task::Position(_) => return self.solved_instead(self.word.iter().copied().map(Task::Position), answer),
        };
        solved.into_iter().collect()
    }

    fn question(&self) -> String {
        let word = apart(&self.word);
        match self.task {
            Task::Spell => {
                format!("Reply with the letters only. Spell with a space between the letters: {}", self.joined())
            }
            Task::Reverse => format!("Reply with the letters only. Reverse the letters: {word}"),
            Task::Sort => format!("Reply with the letters only. Sort the letters from a to z: {word}"),
            Task::Count(letter) => {
                format!("Reply with the number only. How many times does {} occur in {word}?", char::from(letter))
            }
            Task::Position(letter) => {
                format!("Reply with the number only. At which position is the first {} in {word}?", char::from(letter))
            }
        }
    }

    /// Has room for every word of the ladder, or for every word, so that it does not tell the length of the answer.
    fn answer_pattern(&self) -> String {
        let is_on_ladder = self.word.len() <= MAX_LADDER_LETTERS;
        match self.task.letter() {
            Some(_) => "(?:0|[1-9][0-9]?)".to_owned(),
            None => {
                let most = if is_on_ladder { MAX_LADDER_LETTERS } else { MAX_LETTERS };
                format!("[a-z](?: [a-z]){{0,{}}}", most - 1)
            }
        }
    }
}

impl Exercise {
    fn new(task: Task, word: Vec<u8>) -> Option<Exercise> {
        let is_word = (2..=MAX_LETTERS).contains(&word.len()) && word.iter().all(u8::is_ascii_lowercase);
        let has_letter = !matches!(task, Task::Position(letter) if !word.contains(&letter));
        (is_word && has_letter).then_some(Exercise { task, word })
    }

    fn joined(&self) -> String {
        self.word.iter().copied().map(char::from).collect()
    }

    fn count(&self, letter: u8) -> usize {
        self.word.iter().filter(|other| **other == letter).count()
    }

    /// Finds the first of these tasks that the answer solves on the same word.
    fn solved_instead(&self, tasks: impl Iterator<Item = Task>, answer: &str) -> Vec<Exercise> {
        let exercises = tasks.map(|task| Exercise { task, word: self.word.clone() });
        exercises.filter(|exercise| exercise.answer() == answer).collect()
    }
}

impl Task {
    const NAMES: [&'static str; 5] = ["spell", "reverse", "sort", "count", "position"];

    fn has_letter(name: &str) -> bool {
        ["count", "position"].contains(&name)
    }

    /// Reads a task from its name and the letter that it asks for.
    fn read(name: &str, letter: Option<&str>) -> Option<Task> {
        let letter = letter.map(|letter| match letter.as_bytes() {
            [letter @ b'a'..=b'z'] => Some(*letter),
            _ => None,
        });
        Some(match (name, letter) {
            ("spell", None) => Task::Spell,
            ("reverse", None) => Task::Reverse,
            ("sort", None) => Task::Sort,
            ("count", Some(letter)) => Task::Count(letter?),
            ("position", Some(letter)) => Task::Position(letter?),
            _ => return None,
        })
    }

    fn name(self) -> &'static str {
        let [spell, reverse, sort, count, position] = Task::NAMES;
        match self {
            Task::Spell => spell,
            Task::Reverse => reverse,
            Task::Sort => sort,
            Task::Count(_) => count,
            Task::Position(_) => position,
        }
    }

    fn letter(self) -> Option<char> {
        match self {
            Task::Spell | Task::Reverse | Task::Sort => None,
            Task::Count(letter) | Task::Position(letter) => Some(char::from(letter)),
        }
    }
}

/// Returns how many letters the words of a level have, at least and at most.
fn num_letters(level: u32) -> (u64, u64) {
    match level {
        1..=3 => (3, 5),
        4 | 5 => (4, 8),
        _ => (6, 8),
    }
}

fn letter(rng: &mut CounterRng) -> u8 {
    b'a' + rng.below(26) as u8
}

/// Writes letters with a space between every two.
fn apart(word: &[u8]) -> String {
    let letters: Vec<String> = word.iter().map(|letter| char::from(*letter).to_string()).collect();
    letters.join(" ")
}

/// Reads letters with one space between every two.
fn letters(answer: &str) -> Option<Vec<u8>> {
    let letter = |part: &str| match part.as_bytes() {
        [letter @ b'a'..=b'z'] => Some(*letter),
        _ => None,
    };
    answer.split(' ').map(letter).collect()
}
