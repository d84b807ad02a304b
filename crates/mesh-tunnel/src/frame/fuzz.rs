// SPDX-License-Identifier: Apache-2.0
//! Takes any bytes as frames: the result does not depend on how they are cut, no more than one control
//! frame is allocated, and decoded frames encode to what they were.

use mesh_fixtures::Seen;

use super::*;

/// The decoded frames, with data joined, and the end of decoding.
#[derive(Debug, Default, PartialEq)]
struct Read {
    controls: Vec<(StreamId, Control)>,
    data: Vec<(StreamId, Vec<u8>)>,
    whole: bool,
    error: Option<FrameError>,
}

fn read(data: &[u8], cut: usize) -> Read {
    let mut decoder = Decoder::default();
    let mut read = Read::default();
    for piece in data.chunks(cut) {
        let mut rest = piece;
        while !rest.is_empty() {
            let step = match decoder.step(rest) {
                Ok(step) => step,
                Err(error) => {
                    read.error = Some(error);
                    return read;
                }
            };
            assert!(decoder.body.capacity() <= MAX_CONTROL);
            assert!(step.used > 0 && step.used <= rest.len());
            match step.event {
                None => assert_eq!(step.used, rest.len()),
                Some(Event::Control(stream, control)) => read.controls.push((stream, control)),
                Some(Event::Data(stream, length)) => {
                    let bytes = &rest[step.used - length..step.used];
                    match read.data.last_mut() {
                        Some((last, joined)) if *last == stream => joined.extend_from_slice(bytes),
                        _ => read.data.push((stream, bytes.to_vec())),
                    }
                }
            }
            rest = &rest[step.used..];
        }
    }
    read.whole = decoder.at_boundary();
    read
}

/// Decodes `data`; its first byte says how the others are cut.
pub fn frames(data: &[u8]) -> Seen {
    let Some((cut, data)) = data.split_first() else {
        return Vec::new();
    };
    let all = read(data, data.len().max(1));
    assert_eq!(all, read(data, 1 + usize::from(*cut)));
    for (stream, control) in &all.controls {
        let mut bytes = Vec::new();
        encode(*stream, control, &mut bytes);
        let again = read(&bytes, bytes.len());
        assert_eq!(again.controls, [(*stream, *control)]);
        assert!(again.whole);
    }
    let mut seen: Seen = all
        .controls
        .iter()
        .map(|(_, control)| way(control))
        .collect();
    if !all.data.is_empty() {
        seen.push("data");
    }
    seen.push(match all.error {
        Some(FrameError::UnknownType(_)) => "unknown_type",
        Some(FrameError::Length { kind, .. }) if kind >= OPTIONAL => "length_optional",
        Some(FrameError::Length { kind: OPEN, length })
            if (OPEN_BYTES..=MAX_CONTROL).contains(&length) =>
        {
            "length_service"
        }
        Some(FrameError::Length { .. }) => "length",
        Some(FrameError::StreamZero) => "stream_zero",
        Some(FrameError::VersionZero) => "version_zero",
        None if all.whole => "whole",
        None => "cut",
    });
    seen
}

fn way(control: &Control) -> &'static str {
    match control {
        Control::Open(Open { service: None, .. }) => "open",
        Control::Open(_) => "open_service",
        Control::Opened => "opened",
        Control::Refused(_) => "refused",
        Control::Fin => "fin",
        Control::FinAck => "fin_ack",
        Control::Reset(CloseReason { reason: None, .. }) => "reset_application",
        Control::Reset(_) => "reset",
    }
}

#[cfg(test)]
mod tests {
    use mesh_fixtures::replay;

    use super::*;

    const WAYS: &[&str] = &[
        "open",
        "open_service",
        "opened",
        "refused",
        "data",
        "fin",
        "fin_ack",
        "reset",
        "reset_application",
        "unknown_type",
        "length",
        "length_optional",
        "length_service",
        "stream_zero",
        "version_zero",
        "whole",
        "cut",
    ];

    fn raw(kind: u8, stream: u32, length: u32, payload: &[u8]) -> Vec<u8> {
        let [_, a, b, c] = length.to_be_bytes();
        let mut frame = vec![kind, a, b, c];
        frame.extend(stream.to_be_bytes());
        frame.extend_from_slice(payload);
        frame
    }

    fn sound(kind: u8, payload: &[u8]) -> Vec<u8> {
        raw(kind, 1, u32::try_from(payload.len()).unwrap(), payload)
    }

    fn seeds() -> Vec<(&'static str, Vec<u8>)> {
        let at = |text: &str| Endpoint::from(text.parse::<std::net::SocketAddr>().unwrap());
        let open = |service| Open {
            destination: at("10.244.1.7:8080"),
            source: at("[fd00::3]:51234"),
            service,
        };
        let mut stream = Vec::new();
        encode(1, &Control::Open(open(None)), &mut stream);
        stream.extend(data_header(1, 3));
        stream.extend(b"abc");
        for control in [Control::Opened, Control::Fin, Control::FinAck] {
            encode(1, &control, &mut stream);
        }
        encode(
            2,
            &Control::Open(open(Some(at("10.96.0.1:80")))),
            &mut stream,
        );
        let refused = CloseReason {
            cause: Cause::Refused,
            ..CloseReason::new(Reason::ConnectFailed)
        };
        encode(2, &Control::Refused(refused), &mut stream);
        stream.extend(sound(0x80, b"later"));
        encode(3, &Control::Reset(CloseReason::APPLICATION), &mut stream);
        let mut causes = Vec::new();
        for cause in 0..=5_u8 {
            // Reason 300 is of a later version.
            causes.extend(sound(REFUSED, &[1, 44, 0, cause, 0, 0, 0, 0, 0, 0, 0, 9]));
        }
        encode(
            1,
            &Control::Reset(CloseReason::new(Reason::PolicyChanged)),
            &mut causes,
        );
        let with_service = [&[VERSION, HAS_SERVICE][..], &[0; 36]].concat();
        [
            ("stream", 255, stream.clone()),
            ("stream-in-bytes", 0, stream.clone()),
            ("stream-in-nines", 8, stream.clone()),
            ("stream-cut", 2, stream[..70].to_vec()),
            ("causes", 4, causes),
            (
                "later-fields",
                6,
                sound(OPEN, &[&[9, 0xfe][..], &[7; 60]].concat()),
            ),
            ("longest", 40, sound(OPENED, &[0; MAX_CONTROL])),
            ("version-zero", 3, sound(OPEN, &[0; 38])),
            ("service-missing", 3, sound(OPEN, &with_service)),
            ("type-zero", 3, raw(0, 1, 0, b"")),
            ("type-unknown", 3, raw(0x7f, 1, 1, b"x")),
            ("open-short", 3, raw(OPEN, 1, 37, &[1; 37])),
            ("refused-short", 3, raw(REFUSED, 1, 11, &[1; 11])),
            ("fin-long", 3, raw(FIN, 1, 1025, b"")),
            ("data-empty", 3, raw(DATA, 1, 0, b"")),
            ("data-long", 3, raw(DATA, 1, 0x04_0001, b"")),
            ("data-longest", 3, raw(DATA, 1, 0x04_0000, b"begun")),
            ("optional-long", 3, raw(0xff, 0, 1025, b"")),
            ("stream-zero", 3, raw(FIN, 0, 0, b"")),
            ("header-cut", 3, vec![DATA, 0, 0]),
            ("nothing", 0, Vec::new()),
        ]
        .into_iter()
        .map(|(name, cut, bytes)| (name, [&[cut][..], &bytes].concat()))
        .collect()
    }

    #[test]
    fn corpus_takes_every_branch() {
        replay("frames", frames, WAYS, seeds);
    }
}
