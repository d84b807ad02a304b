// SPDX-License-Identifier: Apache-2.0
//! Counts results and times in what test programs print.

/// The results of test programs.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Tally {
    pub(super) passed: u32,
    pub(super) failed: u32,
    /// The names of failed tests, and what else failed.
    pub(super) failures: Vec<String>,
    /// Seconds and name of each test that was timed.
    pub(super) times: Vec<(f64, String)>,
}

impl Tally {
    /// Reads one line of a test program's output.
    pub(super) fn read(&mut self, line: &str) {
        if let Some((name, result)) = line
            .strip_prefix("test ")
            .and_then(|rest| rest.split_once(" ... "))
        {
            self.read_test(name, result);
        }
        let Some(counts) = line.strip_prefix("test result: ") else {
            return;
        };
        for part in counts.split([';', '.']) {
            let mut words = part.split_whitespace();
            match (
                words.next().and_then(|word| word.parse::<u32>().ok()),
                words.next(),
            ) {
                (Some(count), Some("passed")) => self.passed += count,
                (Some(count), Some("failed")) => self.failed += count,
                _ => {}
            }
        }
    }

    /// Reads the result of one test: `ok`, `FAILED` or another word, with or without `<1.234s>`.
    fn read_test(&mut self, name: &str, result: &str) {
        let (word, time) = result.split_once(" <").unwrap_or((result, ""));
        if word == "FAILED" {
            self.failures.push(name.to_owned());
        }
        if let Some(Ok(seconds)) = time.strip_suffix("s>").map(str::parse) {
            self.times.push((seconds, name.to_owned()));
        }
    }

    /// Counts a failure that no test program reports.
    pub(super) fn fail(&mut self, what: String) {
        self.failed += 1;
        self.failures.push(what);
    }

    /// Adds the results of another part.
    pub(super) fn add(&mut self, mut part: Self) {
        self.passed += part.passed;
        self.failed += part.failed;
        self.failures.append(&mut part.failures);
        self.times.append(&mut part.times);
    }

    /// The tests that took the longest, the slowest first.
    pub(super) fn slowest(&mut self, count: usize) -> &[(f64, String)] {
        self.times.sort_by(|a, b| b.0.total_cmp(&a.0));
        &self.times[..count.min(self.times.len())]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tally_sums_all_programs_and_names_failures() {
        let mut tally = Tally::default();
        for line in [
            "test a::b ... ok",
            "test a::c ... FAILED",
            "test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 4 filtered out; finished in 0.01s",
            "the test result: ok. 9 passed",
            "test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 2.00s",
        ] {
            tally.read(line);
        }
        assert_eq!(
            tally,
            Tally {
                passed: 13,
                failed: 1,
                failures: vec!["a::c".to_owned()],
                times: Vec::new(),
            }
        );
    }

    #[test]
    fn tally_orders_timed_tests_by_their_time() {
        let mut tally = Tally::default();
        for line in [
            "test a::b ... ok <0.012s>",
            "test a::c ... FAILED <31.500s>",
            "test a::d ... ok <2.000s>",
            "test a::e ... ignored, started by another test",
        ] {
            tally.read(line);
        }
        assert_eq!(tally.failures, ["a::c"]);
        let slowest = [(31.5, "a::c".to_owned()), (2.0, "a::d".to_owned())];
        assert_eq!(tally.slowest(2), slowest);
        assert_eq!(tally.slowest(9).len(), 3);
    }
}
