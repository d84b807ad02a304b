// SPDX-License-Identifier: Apache-2.0

use prost::Message as _;

use super::*;

#[test]
fn pid_is_parsed_from_runtime_json() {
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
fn messages_are_encoded_as_in_the_cri() {
    let request = ListRequest {
        filter: Some(Filter {
            state: Some(State { state: 1 }),
            labels: BTreeMap::from([("k".to_owned(), "v".to_owned())]),
        }),
    };
    let labels = [0x1a, 6, 0x0a, 1, b'k', 0x12, 1, b'v'];
    let filter = [&[0x12, 2, 0x08, 1], &labels[..]].concat();
    assert_eq!(request.encode_to_vec(), [&[0x0a, 12], &filter[..]].concat());
    // The id, the metadata (ignored) and the creation time.
    let sandbox = [0x0a, 1, b's', 0x12, 2, 0x0a, 0, 0x20, 9];
    let answer = [&[0x0a, 9], &sandbox[..]].concat();
    let answer = ListResponse::decode(&*answer).unwrap();
    assert_eq!((&*answer.items[0].id, answer.items[0].created_at), ("s", 9));
}

#[test]
fn missing_runtime_is_reported_without_blocking() {
    let dir = tempfile::TempDir::new().unwrap();
    let find = ByCri::new("/proc", dir.path().join("no.sock")).unwrap();
    let pod = LocalPod::default();
    let asked = find.path("uid", &pod).unwrap_err().to_string();
    assert!(asked.contains("request pending"), "{asked}");
    let deadline = std::time::Instant::now() + ANSWER;
    loop {
        let why = find.path("uid", &pod).unwrap_err().to_string();
        if !why.contains("request pending") {
            assert!(why.contains("no.sock"), "{why}");
            return;
        }
        assert!(std::time::Instant::now() < deadline, "no result: {why}");
        thread::sleep(Duration::from_millis(5));
    }
}
