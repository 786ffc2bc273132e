//! Proposals that are no problem worth asking: each is refused with a reason.

use domains::{Split, Wording, domain, exam_problems, registry};
use proto::{Niche, Verdict};

use Verdict::{Incorrect, Malformed};

/// Returns the niche of the first problem of a level.
fn niche(name: &str, level: u32) -> Niche {
    let domain = domain(name).unwrap();
    domain.niche(&domain.ladder(level, 0, 0).problem, None).unwrap()
}

#[track_caller]
fn assert_refused(name: &str, niche: Niche, proposal: &str, verdict: Verdict, says: &str) {
    let refused = domain(name).unwrap().admit(niche, proposal).unwrap();
    let refused = refused.expect_err("it is refused");
    let reason = refused.reason.unwrap();
    assert!(refused.verdict == verdict && reason.contains(says), "{name} {proposal:?}: {:?} {reason}", refused.verdict);
    assert!(reason.len() < 500, "a reason is short: {reason}");
}

#[test]
fn proposals_are_refused_with_a_reason() {
    for (name, level, proposal, verdict, says) in [
        ("arithmetic", 2, "", Malformed, "got \"\""),
        ("arithmetic", 2, "47+38", Malformed, "expected the canonical text \"47 + 38\", got \"47+38\""),
        ("arithmetic", 2, "47 + 38 = 85", Malformed, "got \"47 + 38 = 85\""),
        ("arithmetic", 2, "What is 47 + 38?", Malformed, "expected an expression"),
        ("arithmetic", 2, "47 + 38<|im_end|>", Malformed, "got \"47 + 38<|im_end|>\""),
        ("arithmetic", 2, "99999999999999999999999999 + 1", Malformed, "up to 9 digits"),
        ("arithmetic", 2, "999999999 + 1", Incorrect, "not of the level that was asked for: beyond the ladder"),
        ("arithmetic", 2, "7 + 8", Incorrect, "asked for: sums of one-digit numbers, with a value from 10 to 19"),
        ("arithmetic", 8, "47 % 0", Malformed, "by one from 1"),
        ("arithmetic", 2, "reverse d o g", Malformed, "expected an expression"),
        ("comparison", 2, "larger 7", Malformed, "2 or 3 numbers"),
        ("comparison", 2, "larger 47 47", Malformed, "of different value"),
        ("comparison", 2, "largest 47 38", Malformed, "canonical text \"larger 47 38\""),
        ("comparison", 2, "larger 470 38", Incorrect, "asked for: 2 numbers up to 999, larger, which is the first"),
        ("strings", 2, "reverse dog", Malformed, "canonical text \"reverse d o g\""),
        ("strings", 2, "reverse d o \u{e9}", Malformed, "letters from a to z"),
        ("strings", 2, "sort d o g", Incorrect, "asked for: sort 3 to 5 letters, of 3 letters"),
        ("strings", 5, "position x in d o g s", Malformed, "for a letter of the word"),
        ("countdown", 2, "", Malformed, "numbers, an arrow and a target"),
        ("countdown", 2, "25 7 3 -> 82 max 9999", Malformed, "got \"25 7 3 -> 82 max 9999\""),
        ("countdown", 2, "25, 7, 3 -> 82", Malformed, "numbers, an arrow"),
        ("countdown", 2, "25 7 3 -> 99999999999999999999999", Malformed, "numbers, an arrow"),
        ("countdown", 2, "25 7 3 -> 4294967378", Incorrect, "a target from 10 to 99"),
        ("countdown", 2, "25 7 3 -> 9", Incorrect, "a target from 10 to 99"),
        ("countdown", 2, "4294967321 7 3 -> 82", Incorrect, "3 numbers from 1 to 25"),
        ("countdown", 2, "26 7 3 -> 82", Incorrect, "3 numbers from 1 to 25"),
        ("countdown", 2, "25 7 -> 32", Incorrect, "3 numbers from 1 to 25"),
        ("countdown", 2, "25 25 25 -> 90", Incorrect, "has no solution"),
        ("countdown", 2, "7 + 8", Malformed, "numbers, an arrow"),
    ] {
        assert_refused(name, niche(name, level), proposal, verdict, says);
        // Far more text is refused as fast, and quoted in part.
        assert_refused(name, niche(name, level), &format!("{proposal} 1").repeat(20_000), Malformed, "...");
    }
    assert_refused("file", Niche(1), "{\"prompt\":\"What is 6 * 7?\"}", Incorrect, "nobody knows its right answer");
}

#[test]
fn numbers_of_countdown_may_be_proposed_in_any_order() {
    let domain = domain("countdown").unwrap();
    let problem = |proposal| domain.admit(niche("countdown", 2), proposal).unwrap().unwrap().problem.text;
    assert_eq!(problem("3 7 25 -> 82"), "25 7 3 -> 82");
    let large = domain.admit(niche("countdown", 4), "9 50 75 2 -> 59").unwrap().unwrap().problem.text;
    assert_eq!(large, "75 50 9 2 -> 59 max 9999");
}

/// Exam problems, in the notation of proposals, are refused, and no request shows one.
#[test]
fn exam_problems_are_neither_admitted_nor_shown() {
    for spec in domains::exam_specs() {
        let domain = domain(spec.domain).unwrap();
        let Some(proposing) = domain.wording().and_then(Wording::proposing) else { continue };
        for problem in &exam_problems(spec.name, Split::Dev, [spec.domain]).unwrap() {
            // A deduction shows its program and its input.
            let is_whole = !spec.domain.starts_with("programs") || problem.text.ends_with(" -> ?");
            if !is_whole {
                continue;
            }
            let niche = domain.niche(problem, None).unwrap();
            let proposal = problem.text.trim_end_matches(" max 9999").trim_end_matches(" -> ?");
            let says = match spec.domain {
                "programs" | "programs-digits" => "held out for the exams",
                // No proposal has the target 100.
                _ if proposal.ends_with(" 100") => "a target from 10 to 99",
                _ => "is in an exam",
            };
            assert_refused(spec.domain, niche, proposal, Incorrect, says);
            for (_, example) in proposing.examples(niche).unwrap() {
                assert!(domain.admit(niche, &example).unwrap().is_ok(), "{example}");
            }
        }
    }
    let proposes = |name: &str| domain(name).unwrap().wording().is_some_and(|wording| wording.proposing().is_some());
    let names: Vec<&str> = registry().iter().map(|domain| domain.name()).filter(|name| proposes(name)).collect();
    assert_eq!(names, registry().iter().map(|domain| domain.name()).filter(|name| *name != "file").collect::<Vec<_>>());
}
