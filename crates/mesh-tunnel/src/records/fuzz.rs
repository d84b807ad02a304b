// SPDX-License-Identifier: Apache-2.0
//! Takes any bytes as records after the handshake. Because random bytes never authenticate, pieces of the
//! input are sealed with the right key where their first byte says so; data is then decoded as frames.

use mesh_fixtures::{Seen, pieces};

use super::*;
use crate::frame::{Decoder, Event};

fn keyed() -> RecordKey {
    let key = UnboundKey::new(&AES_128_GCM, &[7; 16]).expect("a key of 16 bytes");
    RecordKey {
        key: LessSafeKey::new(key),
        iv: [9; NONCE_LEN],
        sequence: 0,
    }
}

/// Seals content that already has its inner type and padding.
fn sealed(by: &mut RecordKey, inner: &[u8]) -> Vec<u8> {
    let head = head(inner.len() + TAG);
    let mut record = head.to_vec();
    let mut body = inner.to_vec();
    let nonce = by.nonce();
    let tag = by
        .key
        .seal_in_place_separate_tag(nonce, Aad::from(head), &mut body)
        .expect("lengths are right");
    record.extend(body);
    record.extend(tag.as_ref());
    record
}

/// Opens the records in `data`: pieces whose first byte says what follows. 0: raw bytes; 1: the content of
/// a record with inner type and padding; others: the content of a data record.
pub fn records(data: &[u8]) -> Seen {
    let mut peer = keyed();
    let mut wire = Vec::new();
    for piece in pieces(data) {
        match piece.split_first() {
            None => {}
            Some((0, raw)) => wire.extend_from_slice(raw),
            Some((1, inner)) => wire.extend(sealed(&mut peer, inner)),
            Some((_, content)) => {
                let inner = [content, &[Kind::Data as u8]].concat();
                wire.extend(sealed(&mut peer, &inner));
            }
        }
    }
    let mut seen = Seen::new();
    let mut opener = RecordOpener(keyed());
    let mut decoder = Decoder::default();
    let mut rest = &mut wire[..];
    loop {
        let length = match length(rest) {
            Ok(Some(length)) if length <= rest.len() => length,
            Ok(_) => {
                seen.push(if rest.is_empty() { "all" } else { "begun" });
                return seen;
            }
            Err(error) => {
                seen.push(way(&error));
                return seen;
            }
        };
        assert!(length > HEAD + TAG && length <= LONGEST);
        let (record, behind) = rest.split_at_mut(length);
        rest = behind;
        let (kind, content) = match opener.open(record) {
            Ok(opened) => opened,
            Err(error) => {
                seen.push(way(&error));
                return seen;
            }
        };
        assert!(content.start == HEAD && content.len() <= CONTENT);
        seen.push(match kind {
            Kind::Alert => "alert",
            Kind::Handshake => "handshake",
            Kind::Data => "data",
        });
        if kind == Kind::Data && !read(&mut decoder, &record[content], &mut seen) {
            return seen;
        }
    }
}

/// Decodes content as frames; returns whether it is valid.
fn read(decoder: &mut Decoder, mut content: &[u8], seen: &mut Seen) -> bool {
    while !content.is_empty() {
        let Ok(step) = decoder.step(content) else {
            seen.push("frame_wrong");
            return false;
        };
        content = &content[step.used..];
        match step.event {
            Some(Event::Data(..)) => seen.push("frame_data"),
            Some(Event::Control(..)) => seen.push("frame_control"),
            None => assert!(content.is_empty()),
        }
    }
    true
}

fn way(error: &RecordError) -> &'static str {
    match error {
        RecordError::Unprotected(_) => "unprotected",
        RecordError::Length(_) => "length",
        RecordError::Forged => "forged",
        RecordError::Inner => "inner",
        RecordError::Suite | RecordError::Seal => "ours",
    }
}

#[cfg(test)]
mod tests {
    use mesh_fixtures::{join, replay};

    use super::*;

    const WAYS: &[&str] = &[
        "all",
        "begun",
        "unprotected",
        "length",
        "forged",
        "inner",
        "alert",
        "handshake",
        "data",
        "frame_data",
        "frame_control",
        "frame_wrong",
    ];

    fn seeds() -> Vec<(&'static str, Vec<u8>)> {
        let sealed = |bytes: &[u8]| [&[2][..], bytes].concat();
        let frames = [
            &[4, 0, 0, 3, 0, 0, 0, 1][..],
            b"abc",
            &[5, 0, 0, 0, 0, 0, 0, 1],
        ]
        .concat();
        let content = [&[4, 0, 0x3f, 0xf8, 0, 0, 0, 1][..], &[5; CONTENT - 8]].concat();
        let long = [&[1][..], &content, &[1, 2, 23]].concat();
        let padded = [&[1][..], &content, &[23], &[0; 200]].concat();
        let flip = |mut record: Vec<u8>| {
            record[9] ^= 1;
            [vec![0], record].concat()
        };
        vec![
            (
                "frames",
                join(&[&sealed(&frames[..5]), &sealed(&frames[5..])]),
            ),
            ("frames-wrong", join(&[&sealed(&[9; 8])])),
            ("alert", join(&[&[1, 1, 0, 21]])),
            (
                "handshake-padded",
                join(&[&[1, 24, 0, 0, 1, 1, 22, 0, 0, 0]]),
            ),
            ("empty", join(&[&sealed(b""), &sealed(b"")])),
            ("only-padding", join(&[&[1, 0, 0, 0]])),
            ("inner-unknown", join(&[&[1, 7, 20]])),
            ("content-too-long", join(&[&long])),
            ("content-longest", join(&[&padded[..1 + CONTENT + 1]])),
            ("padding-too-long", join(&[&padded])),
            (
                "forged",
                join(&[&flip(super::sealed(&mut keyed(), b"abc\x17"))]),
            ),
            ("again", {
                let record = [vec![0], super::sealed(&mut keyed(), b"abc\x17")].concat();
                join(&[&record, &record])
            }),
            ("unprotected", join(&[&[0, 22, 3, 3, 0, 1, 0]])),
            ("too-short", join(&[&[0, 23, 3, 3, 0, 16]])),
            ("too-long", join(&[&[0, 23, 3, 3, 0x41, 1]])),
            ("begun", join(&[&[0, 23, 3, 3, 0, 40, 1, 2]])),
            ("head-cut", join(&[&[0, 23, 3]])),
            ("nothing", Vec::new()),
        ]
    }

    #[test]
    fn corpus_takes_every_branch() {
        replay("records", records, WAYS, seeds);
    }
}
