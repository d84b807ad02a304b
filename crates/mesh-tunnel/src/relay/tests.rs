// SPDX-License-Identifier: Apache-2.0
use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use mesh_common::{Endpoint, Reason};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::{JoinHandle, LocalSet};

use self::plain::Plain;
use super::*;
use crate::buffers::BufferPool;
use crate::carrier::Carrier;
use crate::frame::{Control, Open, StreamId};
use crate::testing::{Pki, application, pattern};
use crate::tunnel::{Received, Tunnel, TunnelError, TunnelStream};

mod plain;

const MOST_EARLY: usize = <TunnelStream<'_> as Stream>::MAX_BEFORE_REPLY;

#[derive(Default)]
struct Bytes {
    taken: Cell<u64>,
    delivered: Cell<u64>,
}

impl RelayObserver for Bytes {
    fn taken(&self, _app: &Socket, bytes: u64) {
        self.taken.set(self.taken.get() + bytes);
    }

    fn delivered(&self, bytes: u64) {
        self.delivered.set(self.delivered.get() + bytes);
    }

    fn finished(&self) {}
}

const REQUEST: Open = Open {
    destination: Endpoint::NONE,
    source: Endpoint::NONE,
    service: None,
};

/// The result of one side: the outcome, bytes from and to its application, and its carrier.
struct Report<C: Carrier> {
    outcome: Outcome<C::Error>,
    taken: u64,
    delivered: u64,
    carrier: C,
}

fn conclude<C: Carrier>(
    app: &Socket,
    carrier: &mut C,
    outcome: &Outcome<C::Error>,
    stream: StreamId,
) {
    match outcome {
        Outcome::Finished { .. } | Outcome::Refused(_) => carrier.end(stream),
        Outcome::AppReset(_) => carrier.reset(stream, &CloseReason::APPLICATION),
        Outcome::PeerReset(_) | Outcome::CarrierFailed { .. } => app.reset_on_drop(),
    }
}

async fn opener<C: Carrier>(mut carrier: C, app: Socket) -> Report<C> {
    let stream = carrier.open(&REQUEST).unwrap();
    let bytes = Bytes::default();
    let mut replay = ReplayBuffer::default();
    let outcome = Relay::opener(&app, carrier.stream(stream), &bytes, &mut replay)
        .run()
        .await;
    conclude(&app, &mut carrier, &outcome, stream);
    report(outcome, &bytes, carrier, stream).await
}

async fn acceptor<C: Carrier>(mut carrier: C, app: Socket) -> Report<C> {
    let (stream, _request) = carrier.accept().await.unwrap().unwrap();
    carrier.confirm(stream);
    let bytes = Bytes::default();
    let outcome = Relay::acceptor(&app, carrier.stream(stream), &bytes)
        .run()
        .await;
    conclude(&app, &mut carrier, &outcome, stream);
    report(outcome, &bytes, carrier, stream).await
}

/// Sends queued messages before the carrier is handed back.
async fn report<C: Carrier>(
    outcome: Outcome<C::Error>,
    bytes: &Bytes,
    mut carrier: C,
    stream: StreamId,
) -> Report<C> {
    let flushed = {
        let mut stream = carrier.stream(stream);
        std::future::poll_fn(|cx| stream.poll_flush(cx)).await
    };
    if let Err(error) = flushed {
        assert!(matches!(outcome, Outcome::CarrierFailed { .. }), "{error}");
    }
    Report {
        outcome,
        taken: bytes.taken.get(),
        delivered: bytes.delivered.get(),
        carrier,
    }
}

/// A client and a server with both relays between them.
struct Bridge<C: Carrier> {
    client: TcpStream,
    server: TcpStream,
    opener: JoinHandle<Report<C>>,
    acceptor: JoinHandle<Report<C>>,
}

fn bridge<C: Carrier + 'static>((near, far): (C, C)) -> Bridge<C> {
    let (client, app) = application();
    let opener = tokio::task::spawn_local(opener(near, app));
    let (server, app) = application();
    let acceptor = tokio::task::spawn_local(acceptor(far, app));
    Bridge {
        client,
        server,
        opener,
        acceptor,
    }
}

/// Makes connected carriers of one protocol.
trait Fresh: Carrier + Sized + 'static {
    async fn fresh() -> (Self, Self);
}

impl Fresh for Tunnel {
    async fn fresh() -> (Self, Self) {
        Pki::new().tunnels(&Rc::default()).await
    }
}

fn local<T>(test: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(LocalSet::new().run_until(async {
            tokio::time::timeout(Duration::from_secs(60), test)
                .await
                .expect("the test hangs")
        }))
}

async fn write_pattern(stream: &mut (impl tokio::io::AsyncWrite + Unpin), seed: u64, total: u64) {
    let mut chunk = vec![0; 100_000];
    let mut at = 0;
    while at < total {
        let length = usize::try_from(total - at).unwrap().min(chunk.len());
        pattern(seed, at, &mut chunk[..length]);
        stream.write_all(&chunk[..length]).await.unwrap();
        at += length as u64;
    }
}

async fn read_pattern(stream: &mut (impl tokio::io::AsyncRead + Unpin), seed: u64, total: u64) {
    let mut got = vec![0; 150_000];
    let mut expected = got.clone();
    let mut at = 0;
    loop {
        let length = stream.read(&mut got).await.unwrap();
        if length == 0 {
            assert_eq!(at, total, "ended early");
            return;
        }
        pattern(seed, at, &mut expected[..length]);
        assert!(
            got[..length] == expected[..length],
            "wrong bytes after {at}"
        );
        at += length as u64;
    }
}

fn is_reset(result: std::io::Result<usize>) -> bool {
    matches!(result, Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset)
}

#[test]
fn mesh_1_moves_bulk_data_both_ways() {
    bulk_both_ways::<Tunnel>();
}

#[test]
fn plain_moves_bulk_data_both_ways() {
    bulk_both_ways::<Plain>();
}

fn bulk_both_ways<C: Fresh>() {
    const TOTAL: u64 = 64 << 20;
    local(async {
        let bridge = bridge(C::fresh().await);
        let (mut client_in, mut client_out) = bridge.client.into_split();
        let (mut server_in, mut server_out) = bridge.server.into_split();
        tokio::join!(
            async {
                write_pattern(&mut client_out, 1, TOTAL).await;
                client_out.shutdown().await.unwrap();
            },
            async {
                write_pattern(&mut server_out, 2, TOTAL).await;
                server_out.shutdown().await.unwrap();
            },
            read_pattern(&mut server_in, 1, TOTAL),
            read_pattern(&mut client_in, 2, TOTAL),
        );
        for report in [bridge.opener, bridge.acceptor] {
            let report = report.await.unwrap();
            let outcome = report.outcome;
            assert!(matches!(outcome, Outcome::Finished { .. }), "{outcome:?}");
            assert_eq!((report.taken, report.delivered), (TOTAL, TOTAL));
        }
    });
}

#[test]
fn mesh_1_half_closes_from_either_side() {
    half_close_from_either_side::<Tunnel>();
}

#[test]
fn plain_half_closes_from_either_side() {
    half_close_from_either_side::<Plain>();
}

fn half_close_from_either_side<C: Fresh>() {
    local(async {
        for client_first in [true, false] {
            let mut bridge = bridge(C::fresh().await);
            let (first, second) = if client_first {
                (&mut bridge.client, &mut bridge.server)
            } else {
                (&mut bridge.server, &mut bridge.client)
            };
            first.write_all(b"question").await.unwrap();
            first.shutdown().await.unwrap();
            let mut heard = String::new();
            second.read_to_string(&mut heard).await.unwrap();
            assert_eq!(heard, "question");
            second.write_all(b"a long answer").await.unwrap();
            second.shutdown().await.unwrap();
            heard.clear();
            first.read_to_string(&mut heard).await.unwrap();
            assert_eq!(heard, "a long answer");
            let opener = bridge.opener.await.unwrap();
            let acceptor = bridge.acceptor.await.unwrap();
            for (report, first) in [(opener, client_first), (acceptor, !client_first)] {
                let outcome = report.outcome;
                assert!(
                    matches!(outcome, Outcome::Finished { local_first } if local_first == first),
                    "{outcome:?}"
                );
            }
        }
    });
}

#[test]
fn mesh_1_passes_on_a_reset_from_either_side() {
    reset_from_either_side::<Tunnel>();
}

#[test]
fn plain_passes_on_a_reset_from_either_side() {
    reset_from_either_side::<Plain>();
}

fn reset_from_either_side<C: Fresh>() {
    local(async {
        for from_client in [true, false] {
            for half_closed in [true, false] {
                let mut bridge = bridge(C::fresh().await);
                bridge.client.write_all(b"x").await.unwrap();
                bridge.server.read_u8().await.unwrap();
                bridge.server.write_all(b"y").await.unwrap();
                bridge.client.read_u8().await.unwrap();
                let (mut dying, mut left) = if from_client {
                    (bridge.client, bridge.server)
                } else {
                    (bridge.server, bridge.client)
                };
                if half_closed {
                    dying.shutdown().await.unwrap();
                    assert_eq!(left.read(&mut [0; 9]).await.unwrap(), 0);
                }
                dying.set_zero_linger().unwrap();
                drop(dying);
                // A plain carrier passes a reset on when it is dropped.
                let (opener, acceptor) = if from_client {
                    let opener = bridge.opener.await.unwrap().outcome;
                    (opener, bridge.acceptor.await.unwrap().outcome)
                } else {
                    let acceptor = bridge.acceptor.await.unwrap().outcome;
                    (bridge.opener.await.unwrap().outcome, acceptor)
                };
                if half_closed {
                    left.writable().await.unwrap();
                    assert!(left.take_error().unwrap().is_some());
                } else {
                    assert!(is_reset(left.read(&mut [0; 9]).await));
                }
                let (near, far) = if from_client {
                    (opener, acceptor)
                } else {
                    (acceptor, opener)
                };
                assert!(matches!(near, Outcome::AppReset(_)), "{near:?}");
                assert!(
                    matches!(far, Outcome::PeerReset(reason) if reason == CloseReason::APPLICATION),
                    "{far:?}"
                );
            }
        }
    });
}

#[test]
fn cut_tunnel_resets_both_applications() {
    local(async {
        let (near, far) = Pki::new().tunnels(&Rc::default()).await;
        let cut = socket2::SockRef::from(near.socket().as_ref())
            .try_clone()
            .unwrap();
        let mut bridge = bridge((near, far));
        bridge.client.write_all(b"x").await.unwrap();
        bridge.server.read_u8().await.unwrap();
        cut.shutdown(std::net::Shutdown::Both).unwrap();
        assert!(is_reset(bridge.client.read(&mut [0; 9]).await));
        assert!(is_reset(bridge.server.read(&mut [0; 9]).await));
        let outcome = bridge.acceptor.await.unwrap().outcome;
        assert!(
            matches!(
                &outcome,
                Outcome::CarrierFailed {
                    error: TunnelError::Cut,
                    may_retry: false
                }
            ),
            "{outcome:?}"
        );
    });
}

#[test]
fn tunnel_carries_one_connection_after_another() {
    local(async {
        let buffers = Rc::new(BufferPool::default());
        let mut tunnels = Pki::new().tunnels(&buffers).await;
        for round in 1..=20_u32 {
            let mut bridge = bridge(tunnels);
            let question = format!("question {round}");
            bridge.client.write_all(question.as_bytes()).await.unwrap();
            bridge.client.shutdown().await.unwrap();
            let mut heard = String::new();
            bridge.server.read_to_string(&mut heard).await.unwrap();
            assert_eq!(heard, question);
            bridge.server.write_all(b"answer").await.unwrap();
            drop(bridge.server);
            heard.clear();
            bridge.client.read_to_string(&mut heard).await.unwrap();
            assert_eq!(heard, "answer");
            let mut near = bridge.opener.await.unwrap().carrier;
            assert!(near.is_quiet().unwrap());
            assert_eq!(near.streams(), round);
            tunnels = (near, bridge.acceptor.await.unwrap().carrier);
        }
        assert_eq!(buffers.lent(), 0, "an idle tunnel holds no buffer");
    });
}

/// Reads at the acceptor's end until `done` says that enough of the stream's data has come.
async fn hear(far: &mut Tunnel, app: &Socket, done: impl Fn(usize) -> bool) -> usize {
    let mut heard = 0;
    let number = far.streams();
    std::future::poll_fn(|cx| {
        while !done(heard) {
            match far.received().unwrap() {
                Received::Nothing => std::task::ready!(far.poll_fill(cx)).unwrap(),
                Received::Data => {
                    let mut stream = far.stream(number);
                    heard += std::task::ready!(stream.poll_deliver(cx, app)).unwrap();
                }
                Received::Control(..) => panic!("nothing else was sent"),
            }
        }
        Poll::Ready(heard)
    })
    .await
}

#[test]
fn data_before_the_reply_is_sent_at_once_and_bounded() {
    local(async {
        let (near, mut far) = Pki::new().tunnels(&Rc::default()).await;
        let (mut client, app) = application();
        let opener = tokio::task::spawn_local(opener(near, app));
        let (stream, Control::Open(_)) = far.control().await.unwrap() else {
            panic!("no OPEN");
        };
        far.begin_accepted(stream).unwrap();
        let (mut server, app) = application();
        // A header, and then a body: neither waits for the reply.
        for piece in [b"header".as_slice(), b"body"] {
            client.write_all(piece).await.unwrap();
            hear(&mut far, &app, |heard| heard == piece.len()).await;
        }
        let mut heard = [0; 10];
        server.read_exact(&mut heard).await.unwrap();
        assert_eq!(heard, *b"headerbody");
        client.write_all(&[7; 60_000]).await.unwrap();
        let early = hear(&mut far, &app, |heard| heard == MOST_EARLY - 10).await;
        let more = hear(&mut far, &app, |heard| heard > 0);
        let more = tokio::time::timeout(Duration::from_millis(300), more).await;
        assert!(more.is_err(), "more than can be sent again");
        far.queue(stream, &Control::Opened);
        std::future::poll_fn(|cx| far.poll_flush(cx)).await.unwrap();
        hear(&mut far, &app, |heard| heard == 60_000 - early).await;
        drop(client);
        opener.abort();
    });
}

#[test]
fn reply_does_not_wait_for_a_silent_application() {
    local(async {
        let (mut near, far) = Pki::new().tunnels(&Rc::default()).await;
        let (_server, app) = application();
        let acceptor = tokio::task::spawn_local(acceptor(far, app));
        let stream = near.begin().unwrap();
        near.queue(stream, &Control::Open(REQUEST));
        assert_eq!(near.control().await.unwrap(), (stream, Control::Opened));
        acceptor.abort();
    });
}

#[test]
fn late_bytes_of_a_refused_stream_never_reach_the_next_stream() {
    local(async {
        let (near, mut far) = Pki::new().tunnels(&Rc::default()).await;
        let (mut client, app) = application();
        client.write_all(b"secret of the first").await.unwrap();
        client.shutdown().await.unwrap();
        let refused = tokio::task::spawn_local(opener(near, app));
        let (stream, Control::Open(_)) = far.control().await.unwrap() else {
            panic!("no OPEN");
        };
        far.begin_accepted(stream).unwrap();
        let reason = CloseReason::new(Reason::DefaultDeny);
        far.refuse(stream, &reason);
        let next = tokio::task::spawn_local(async move {
            let (server, app) = application();
            (acceptor(far, app).await, server)
        });
        let report = refused.await.unwrap();
        assert!(matches!(report.outcome, Outcome::Refused(got) if got == reason));

        let (mut client, app) = application();
        client.write_all(b"second").await.unwrap();
        client.shutdown().await.unwrap();
        let opener = tokio::task::spawn_local(opener(report.carrier, app));
        let finish = async {
            let (report, mut server) = next.await.unwrap();
            let mut heard = String::new();
            server.read_to_string(&mut heard).await.unwrap();
            (heard, report)
        };
        // The acceptor ends only when its server has finished: it never does here.
        let gone = tokio::time::timeout(Duration::from_millis(300), finish).await;
        assert!(gone.is_err());
        drop(client);
        opener.abort();
    });
}

#[test]
fn slow_reader_applies_back_pressure_within_bounded_memory() {
    local(async {
        let buffers = Rc::new(BufferPool::default());
        let bridge = bridge(Pki::new().tunnels(&buffers).await);
        let mut chunk = vec![0; 1 << 20];
        let mut sent: u64 = 0;
        loop {
            pattern(3, sent, &mut chunk);
            match tokio::time::timeout(Duration::from_millis(500), bridge.client.writable()).await {
                Ok(writable) => writable.unwrap(),
                // Nothing has moved for long: everything between the two is full.
                Err(_elapsed) => break,
            }
            match bridge.client.try_write(&chunk) {
                Ok(written) => sent += written as u64,
                Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
            }
        }
        // Four socket buffers of the kernel's (tcp_wmem and tcp_rmem: at most 4 and 6 MB).
        assert!(sent < 32 << 20, "{sent}");
        // One batch on its way out, and one on its way in.
        assert!(buffers.lent() <= 2 * 270_000, "{}", buffers.lent());
        let Bridge {
            mut client,
            mut server,
            opener,
            acceptor,
        } = bridge;
        tokio::join!(read_pattern(&mut server, 3, sent), async {
            client.shutdown().await.unwrap();
        });
        drop(server);
        opener.await.unwrap();
        acceptor.await.unwrap();
        assert_eq!(buffers.lent(), 0);
    });
}

#[test]
fn reset_reaches_an_application_that_reads_nothing() {
    local(async {
        let (near, far) = Pki::new().tunnels(&Rc::default()).await;
        let dying = socket2::SockRef::from(near.socket().as_ref())
            .try_clone()
            .unwrap();
        let bridge = bridge((near, far));
        let chunk = vec![0; 1 << 20];
        while tokio::time::timeout(Duration::from_millis(300), bridge.client.writable())
            .await
            .is_ok()
        {
            let _full = bridge.client.try_write(&chunk);
        }
        // The opener's node goes away in the middle.
        dying.set_linger(Some(Duration::ZERO)).unwrap();
        drop(dying);
        bridge.opener.abort();
        let outcome = bridge.acceptor.await.unwrap().outcome;
        assert!(
            matches!(outcome, Outcome::CarrierFailed { .. }),
            "{outcome:?}"
        );
    });
}
