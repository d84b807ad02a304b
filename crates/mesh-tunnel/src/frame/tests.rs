// SPDX-License-Identifier: Apache-2.0
use std::net::SocketAddr;

use super::*;

fn at(text: &str) -> Endpoint {
    text.parse::<SocketAddr>().unwrap().into()
}

fn open(service: Option<&str>) -> Control {
    Control::Open(Open {
        destination: at("10.244.1.7:8080"),
        source: at("10.244.0.3:51234"),
        service: service.map(at),
    })
}

fn every_control() -> Vec<Control> {
    let denied = CloseReason {
        reason: Some(Reason::Policy),
        cause: Cause::None,
        rule: RuleId(0x0102_0304_0506_0708),
    };
    let refused = CloseReason {
        cause: Cause::Refused,
        ..CloseReason::new(Reason::ConnectFailed)
    };
    vec![
        open(None),
        open(Some("[fd00::1]:80")),
        Control::Opened,
        Control::Refused(denied),
        Control::Refused(refused),
        Control::Fin,
        Control::FinAck,
        Control::Reset(CloseReason::APPLICATION),
        Control::Reset(CloseReason::new(Reason::PolicyChanged)),
    ]
}

/// The frames of a whole byte stream, with application data joined.
#[derive(Debug, Default, PartialEq)]
struct Said {
    controls: Vec<(StreamId, Control)>,
    data: Vec<u8>,
}

fn read(decoder: &mut Decoder, mut input: &[u8], said: &mut Said) -> Result<(), FrameError> {
    loop {
        let step = decoder.step(input)?;
        match step.event {
            Some(Event::Control(stream, control)) => said.controls.push((stream, control)),
            Some(Event::Data(_, len)) => {
                said.data
                    .extend_from_slice(&input[step.used - len..step.used]);
            }
            None => {
                assert_eq!(step.used, input.len());
                return Ok(());
            }
        }
        input = &input[step.used..];
    }
}

fn everything() -> (Vec<u8>, Said) {
    let mut bytes = Vec::new();
    let mut said = Said::default();
    for (i, control) in (1..).zip(every_control()) {
        encode(i, &control, &mut bytes);
        said.controls.push((i, control));
        let data: Vec<u8> = (0..u8::try_from(i).unwrap() * 5).collect();
        bytes.extend_from_slice(&data_header(i, data.len()));
        bytes.extend_from_slice(&data);
        said.data.extend_from_slice(&data);
    }
    (bytes, said)
}

#[test]
fn every_frame_decodes_across_every_cut() {
    let (bytes, expected) = everything();
    for cut in 0..=bytes.len() {
        let mut decoder = Decoder::default();
        let mut said = Said::default();
        read(&mut decoder, &bytes[..cut], &mut said).unwrap();
        read(&mut decoder, &bytes[cut..], &mut said).unwrap();
        assert_eq!(said, expected, "cut at {cut}");
        assert!(decoder.at_boundary());
    }
    let mut decoder = Decoder::default();
    let mut said = Said::default();
    for byte in bytes.chunks(1) {
        read(&mut decoder, byte, &mut said).unwrap();
    }
    assert_eq!(said, expected, "byte by byte");
}

#[test]
fn truncated_frame_yields_no_event() {
    for control in every_control() {
        let mut bytes = Vec::new();
        encode(7, &control, &mut bytes);
        for end in 0..bytes.len() {
            let mut decoder = Decoder::default();
            let mut said = Said::default();
            read(&mut decoder, &bytes[..end], &mut said).unwrap();
            assert_eq!(said, Said::default(), "{control:?} cut at {end}");
            assert_eq!(decoder.at_boundary(), end == 0);
        }
    }
}

#[test]
fn encoding_matches_the_specification() {
    let mut bytes = Vec::new();
    encode(0x0102_0304, &open(Some("[fd00::1]:80")), &mut bytes);
    let mapped = |a: [u8; 4]| [&[0; 10][..], &[0xff, 0xff], &a].concat();
    let mut expected = vec![1, 0, 0, 56, 1, 2, 3, 4, 1, 1];
    expected.extend(mapped([10, 244, 1, 7]));
    expected.extend([0x1f, 0x90]);
    expected.extend(mapped([10, 244, 0, 3]));
    expected.extend([0xc8, 0x22]);
    expected.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 80]);
    assert_eq!(bytes, expected);

    assert_eq!(data_header(9, MAX_DATA), [4, 4, 0, 0, 0, 0, 0, 9]);
    let mut bytes = Vec::new();
    encode(
        1,
        &Control::Reset(CloseReason::new(Reason::PodDeleted)),
        &mut bytes,
    );
    assert_eq!(
        bytes,
        [7, 0, 0, 12, 0, 0, 0, 1, 0, 40, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    );
}

#[test]
fn invalid_lengths_are_refused_before_allocation() {
    let cases = [
        (DATA, 0),
        (DATA, MAX_DATA + 1),
        (DATA, 0xff_ffff),
        (OPEN, 0),
        (OPEN, OPEN_BYTES - 1),
        (OPEN, MAX_CONTROL + 1),
        (OPENED, MAX_CONTROL + 1),
        (REFUSED, CLOSE_REASON_BYTES - 1),
        (RESET, 0),
        (RESET, 0xff_ffff),
        (FIN, 0xff_ffff),
        (0x80, MAX_CONTROL + 1),
        (0xff, 0xff_ffff),
    ];
    for (kind, length) in cases {
        let [_, a, b, c] = u32::try_from(length).unwrap().to_be_bytes();
        let mut decoder = Decoder::default();
        let got = decoder.step(&[kind, a, b, c, 0, 0, 0, 1]);
        assert_eq!(got, Err(FrameError::Length { kind, length }));
        assert_eq!(decoder.body.capacity(), 0);
    }
}

#[test]
fn unknown_frame_types_are_refused_or_skipped_by_range() {
    for kind in [0, 8, 0x7f] {
        let got = Decoder::default().step(&[kind, 0, 0, 0, 0, 0, 0, 1]);
        assert_eq!(got, Err(FrameError::UnknownType(kind)));
    }
    let mut bytes = vec![0x80, 0, 0, 3, 0, 0, 0, 0, 1, 2, 3];
    encode(4, &Control::Fin, &mut bytes);
    let mut said = Said::default();
    read(&mut Decoder::default(), &bytes, &mut said).unwrap();
    assert_eq!(said.controls, [(4, Control::Fin)]);

    assert_eq!(
        Decoder::default().step(&[FIN, 0, 0, 0, 0, 0, 0, 0]),
        Err(FrameError::StreamZero)
    );
    let mut zero = Vec::new();
    encode(1, &open(None), &mut zero);
    zero[HEADER] = 0;
    assert_eq!(Decoder::default().step(&zero), Err(FrameError::VersionZero));
}

#[test]
fn fields_of_a_later_version_are_skipped() {
    let mut bytes = Vec::new();
    encode(1, &open(None), &mut bytes);
    bytes[HEADER] = 2;
    bytes[3] += 5;
    bytes.extend([9; 5]);
    encode(1, &Control::Fin, &mut bytes);
    let mut said = Said::default();
    read(&mut Decoder::default(), &bytes, &mut said).unwrap();
    assert_eq!(said.controls, [(1, open(None)), (1, Control::Fin)]);

    // A flag that promises a service which is not there.
    let mut bytes = Vec::new();
    encode(1, &open(None), &mut bytes);
    bytes[HEADER + 1] = HAS_SERVICE;
    assert!(matches!(
        Decoder::default().step(&bytes),
        Err(FrameError::Length { kind: OPEN, .. })
    ));

    let mut unknown = Vec::new();
    encode(
        1,
        &Control::Reset(CloseReason::new(Reason::Policy)),
        &mut unknown,
    );
    unknown[HEADER] = 0xff;
    let mut said = Said::default();
    read(&mut Decoder::default(), &unknown, &mut said).unwrap();
    assert_eq!(
        said.controls,
        [(1, Control::Reset(CloseReason::new(Reason::Protocol)))]
    );
}

/// Any bytes at all, cut anywhere, give the same frames or the same error.
#[test]
fn random_bytes_decode_equally_for_every_cut() {
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let (good, _) = everything();
    for _ in 0..20_000 {
        let mut bytes = good.clone();
        for _ in 0..=(next() % 4) {
            let i = usize::try_from(next() % good.len() as u64).unwrap();
            bytes[i] = next().to_be_bytes()[0];
        }
        let cut = usize::try_from(next() % good.len() as u64).unwrap();
        let mut whole = Said::default();
        let one = read(&mut Decoder::default(), &bytes, &mut whole);
        let mut decoder = Decoder::default();
        let mut pieces = Said::default();
        let two = read(&mut decoder, &bytes[..cut], &mut pieces)
            .and_then(|()| read(&mut decoder, &bytes[cut..], &mut pieces));
        assert_eq!((one, whole), (two, pieces));
    }
}
