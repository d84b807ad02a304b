// SPDX-License-Identifier: Apache-2.0
//! The lines of the demo, and the control: without enrollment every line fails.

use mesh_test::demo::{Demo, LINES};

#[test]
fn every_demo_line_passes() {
    let demo = Demo::start(true, |_| {}).expect("demo");
    for line in LINES {
        let evidence = (line.check)(&demo).expect(line.title);
        assert!(evidence.lines().count() > 0, "{}", line.title);
    }
}

#[test]
fn every_demo_line_fails_without_enrollment() {
    let demo = Demo::start(false, |_| {}).expect("demo");
    let reasons = [
        "ss in client shows no tunnel to web",
        "crossed the wire in clear",
        "the connection itself crossed the wire",
        "no proof of who it was",
        "plain was served",
        "ss shows no agent's end",
        "waited 10s in vain for the metrics to follow",
    ];
    for (line, reason) in LINES.iter().zip(reasons) {
        let result = (line.check)(&demo).map_err(|error| format!("{error:#}"));
        let fails = result.as_ref().is_err_and(|text| text.contains(reason));
        assert!(fails, "{}: {result:?}", line.title);
    }
    assert_eq!(LINES.len(), reasons.len());
}
