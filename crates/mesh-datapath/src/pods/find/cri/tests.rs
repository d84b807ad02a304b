// SPDX-License-Identifier: Apache-2.0

use prost::Message as _;

use super::*;

#[test]
fn the_process_is_that_of_the_runtimes_json() {
    assert_eq!(process_of(r#"{"sandboxID":"a","pid":77,"x":[]}"#), Some(77));
    for other in [
        r#"{"pid":0}"#,
        r#"{"pid":"7"}"#,
        "{}",
        "",
        r#"{"pid":4294967296}"#,
    ] {
        assert_eq!(process_of(other), None, "{other}");
    }
}

#[test]
fn the_bytes_are_those_of_the_cri() {
    let request = ListRequest {
        filter: Some(Filter {
            state: Some(State { state: 1 }),
            labels: BTreeMap::from([("k".to_owned(), "v".to_owned())]),
        }),
    };
    let labels = [0x1a, 6, 0x0a, 1, b'k', 0x12, 1, b'v'];
    let filter = [&[0x12, 2, 0x08, 1], &labels[..]].concat();
    assert_eq!(request.encode_to_vec(), [&[0x0a, 12], &filter[..]].concat());
    // The id, the metadata (passed over), and when it was made.
    let sandbox = [0x0a, 1, b's', 0x12, 2, 0x0a, 0, 0x20, 9];
    let answer = [&[0x0a, 9], &sandbox[..]].concat();
    let answer = ListResponse::decode(&*answer).unwrap();
    assert_eq!((&*answer.items[0].id, answer.items[0].created_at), ("s", 9));
}

#[test]
fn a_runtime_that_is_not_there_is_named_and_nobody_waits_for_it() {
    let dir = tempfile::TempDir::new().unwrap();
    let find = ByCri::new("/proc", dir.path().join("no.sock")).unwrap();
    let pod = LocalPod::default();
    let asked = find.path("uid", &pod).unwrap_err().to_string();
    assert!(asked.contains("it has been asked"), "{asked}");
    let deadline = std::time::Instant::now() + ANSWER;
    loop {
        let why = find.path("uid", &pod).unwrap_err().to_string();
        if !why.contains("it has been asked") {
            assert!(why.contains("no.sock"), "{why}");
            return;
        }
        assert!(std::time::Instant::now() < deadline, "no answer: {why}");
        thread::sleep(Duration::from_millis(5));
    }
}
