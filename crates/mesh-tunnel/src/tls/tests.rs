// SPDX-License-Identifier: Apache-2.0
//! Our record layer against rustls's own.

use std::io::Write as _;
use std::net::TcpStream;
use std::rc::Rc;
use std::sync::Arc;

use mesh_common::Endpoint;
use rustls::{ClientConnection, ServerConnection};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;
use crate::Carrier as _;
use crate::buffers::BufferAccount;
use crate::frame::{self, Control, Decoder, Event, Open};
use crate::relay::{Outcome, Relay, RelayObserver, ReplayBuffer};
use crate::testing::{Pki, application, name, sockets, streams};
use crate::tunnel::{Tunnel, TunnelError};

struct Unobserved;

impl RelayObserver for Unobserved {
    fn taken(&self, _: &Socket, _: u64) {}
    fn delivered(&self, _: u64) {}
    fn finished(&self) {}
}

fn open() -> Control {
    Control::Open(Open {
        destination: Endpoint::NONE,
        source: Endpoint::NONE,
        service: None,
    })
}

fn data(stream: u32, bytes: &[u8]) -> Vec<u8> {
    [&frame::data_header(stream, bytes.len())[..], bytes].concat()
}

fn proven<T>(_: &T) -> Result<(), HandshakeError> {
    Ok(())
}

/// Reads frames from rustls until a control frame; returns it with the data before it.
fn until_control(plain: &mut impl std::io::Read, decoder: &mut Decoder) -> (Vec<u8>, Control) {
    let mut seen = Vec::new();
    loop {
        let mut byte = [0];
        plain.read_exact(&mut byte).unwrap();
        match decoder.step(&byte).unwrap().event {
            Some(Event::Data(..)) => seen.push(byte[0]),
            Some(Event::Control(_, control)) => return (seen, control),
            None => {}
        }
    }
}

/// A client with rustls's own records, that sends its first frames together with the end of its
/// handshake, and asks for new keys in between.
fn foreign_opener(stream: TcpStream, config: Arc<ClientConfig>) {
    let mut stream = stream;
    let mut connection = ClientConnection::new(config, name()).unwrap();
    let mut first = Vec::new();
    frame::encode(1, &open(), &mut first);
    first.extend(data(1, b"early "));
    // Kept by rustls until the handshake is over, and then sent with its last flight.
    connection.writer().write_all(&first).unwrap();
    let mut tls = rustls::Stream::new(&mut connection, &mut stream);
    let mut decoder = Decoder::default();
    assert_eq!(until_control(&mut tls, &mut decoder).1, Control::Opened);
    for _ in 0..3 {
        tls.conn.refresh_traffic_keys().unwrap();
        tls.write_all(&data(1, b"rekeyed ")).unwrap();
        tls.flush().unwrap();
    }
    let mut last = Vec::new();
    frame::encode(1, &Control::Fin, &mut last);
    tls.write_all(&last).unwrap();
    tls.flush().unwrap();
    let (answer, end) = until_control(&mut tls, &mut decoder);
    assert_eq!(end, Control::Fin);
    assert!(answer.len() == 100_000 && answer.iter().all(|byte| *byte == 7));
    assert_eq!(until_control(&mut tls, &mut decoder).1, Control::FinAck);
}

#[tokio::test]
async fn data_sent_with_the_handshake_and_key_updates_are_read() {
    let pki = Pki::new();
    let (near, far) = streams();
    near.set_nonblocking(false).unwrap();
    let config = Arc::clone(&pki.client);
    let foreign = tokio::task::spawn_blocking(move || foreign_opener(near, config));
    let far = Socket::new(far).unwrap();
    let (secured, ()) = accept(&far, &Unscheduled, Arc::clone(&pki.server), proven)
        .await
        .unwrap();
    assert!(!secured.early.is_empty() || !secured.unread.is_empty());
    let mut tunnel = Tunnel::new(
        far,
        secured,
        BufferAccount::new(Rc::default(), Arc::new(())),
    );
    let (stream, _open) = tunnel.control().await.unwrap();
    tunnel.begin_accepted(stream).unwrap();
    tunnel.queue(stream, &Control::Opened);
    let (mut server, app) = application();
    let serve = async {
        let mut heard = String::new();
        server.read_to_string(&mut heard).await.unwrap();
        assert_eq!(heard, "early rekeyed rekeyed rekeyed ");
        server.write_all(&[7; 100_000]).await.unwrap();
        server.shutdown().await.unwrap();
    };
    let carry = async {
        let end = Relay::acceptor(&app, tunnel.stream(stream), &Unobserved)
            .run()
            .await;
        assert!(matches!(end, Outcome::Finished { .. }), "{end:?}");
        std::future::poll_fn(|cx| tunnel.poll_flush(cx))
            .await
            .unwrap();
    };
    tokio::join!(serve, carry);
    foreign.await.unwrap();
}

/// A server with rustls's own records: sends tickets, and asks for new keys.
fn foreign_acceptor(stream: TcpStream, config: Arc<ServerConfig>) {
    let mut stream = stream;
    let mut connection = ServerConnection::new(config).unwrap();
    let mut tls = rustls::Stream::new(&mut connection, &mut stream);
    let mut decoder = Decoder::default();
    assert_eq!(until_control(&mut tls, &mut decoder).1, open());
    let mut reply = Vec::new();
    frame::encode(1, &Control::Opened, &mut reply);
    tls.write_all(&reply).unwrap();
    tls.conn.refresh_traffic_keys().unwrap();
    tls.write_all(&data(1, b"under a new key")).unwrap();
    tls.flush().unwrap();
    let (heard, end) = until_control(&mut tls, &mut decoder);
    assert_eq!(
        (heard.as_slice(), end),
        (&b"question, and more"[..], Control::Fin)
    );
    let mut last = Vec::new();
    frame::encode(1, &Control::Fin, &mut last);
    frame::encode(1, &Control::FinAck, &mut last);
    tls.write_all(&last).unwrap();
    tls.conn.send_close_notify();
    tls.flush().unwrap();
}

#[tokio::test]
async fn server_tickets_and_key_updates_are_read_and_sessions_resume() {
    let pki = Pki::new();
    for round in 0..2 {
        let (near, far) = streams();
        far.set_nonblocking(false).unwrap();
        let config = Arc::clone(&pki.server);
        let foreign = tokio::task::spawn_blocking(move || foreign_acceptor(far, config));
        let near = Socket::new(near).unwrap();
        let kind = |c: &CommonState| Ok::<_, HandshakeError>(c.handshake_kind());
        let (secured, kind) = connect(&near, &Unscheduled, Arc::clone(&pki.client), name(), kind)
            .await
            .unwrap();
        let resumed = kind == Some(rustls::HandshakeKind::Resumed);
        assert_eq!(resumed, round > 0, "{kind:?}");
        assert!(!secured.unsent.is_empty(), "the last flight goes with OPEN");
        let mut tunnel = Tunnel::new(
            near,
            secured,
            BufferAccount::new(Rc::default(), Arc::new(())),
        );
        let (mut client, app) = application();
        let stream = tunnel.begin().unwrap();
        tunnel.queue(stream, &open());
        let ask = async {
            client.write_all(b"question").await.unwrap();
            let mut heard = [0; 15];
            client.read_exact(&mut heard).await.unwrap();
            assert_eq!(&heard, b"under a new key");
            client.write_all(b", and more").await.unwrap();
            client.shutdown().await.unwrap();
            assert_eq!(client.read(&mut heard).await.unwrap(), 0);
        };
        let carry = async {
            let mut replay = ReplayBuffer::default();
            let relay = Relay::opener(&app, tunnel.stream(stream), &Unobserved, &mut replay);
            let end = relay.run().await;
            assert!(
                matches!(end, Outcome::Finished { local_first: true }),
                "{end:?}"
            );
        };
        tokio::join!(ask, carry);
        foreign.await.unwrap();
        let waiting = tunnel.is_quiet();
        assert!(matches!(waiting, Err(TunnelError::Closed)), "{waiting:?}");
    }
}

#[tokio::test]
async fn handshake_fails_if_the_peer_closes_or_sends_no_tls() {
    for babble in [&b""[..], b"GET / HTTP/1.1\r\n\r\n", &[22, 3, 1, 0xff, 0xff]] {
        let (near, far) = sockets();
        let babble = [std::io::IoSlice::new(babble)];
        let length = babble[0].len();
        std::future::poll_fn(|cx| near.poll_write(cx, &babble, length))
            .await
            .unwrap();
        near.finish().unwrap();
        let refused = accept(&far, &Unscheduled, Arc::clone(&Pki::new().server), proven).await;
        assert!(refused.is_err());
    }
}
