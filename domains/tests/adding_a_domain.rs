//! The example of docs/adding-a-domain.md, which has neither symbols nor exams, is a valid domain.

use domains::{Domain, Judged};
use proto::Verdict;

use crate::backwards::Backwards;

#[path = "../examples/backwards.rs"]
#[allow(dead_code, reason = "the example has a main")]
mod backwards;

#[test]
fn a_domain_needs_neither_symbols_nor_exams() {
    let domain: &dyn Domain = &Backwards;
    assert!(domain.symbols().is_none() && domain.exams().is_none());
    let problem = domain.ladder(1, 0, 0).problem;
    assert_eq!(domain.level_of(domain.niche(&problem, None).unwrap()), 1);
    assert!(!domain.is_exam(&problem));
    let answer: String = problem.text.chars().rev().collect();
    assert_eq!(domain.judge(&problem, None, &answer).unwrap(), Judged::correct());
    let wrong = domain.judge(&problem, None, "xyz").unwrap();
    assert_eq!((wrong.verdict, wrong.reason.as_deref()), (Verdict::Incorrect, Some("is another word")));
    assert_eq!(domain.hindsight(&problem, "xyz").unwrap().unwrap().text, "zyx");
    assert_eq!(domain.executions(&problem, "xyz").unwrap(), []);
    assert!(domain.problem_from_text("Word").is_err());
}
