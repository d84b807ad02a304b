// SPDX-License-Identifier: Apache-2.0
//! Hostile peers, with and without a valid certificate.

use mesh_common::{Endpoint, Reason};
use mesh_identity::{SpiffeId, server_name};
use mesh_tunnel::buffers::BufferAccount;
use mesh_tunnel::frame::{CloseReason, Control, Open, StreamId};
use mesh_tunnel::tls::{self, Unscheduled};
use mesh_tunnel::{Socket, Tunnel, TunnelError};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::LocalSet;

use super::super::outbound::HandshakeFailure;
use super::super::*;
use super::rig::*;

/// Opens a tunnel to the server's node with the client's certificate and address.
async fn tunnel(rig: &Rig) -> Tunnel {
    let trust = rig.identities.trust_domain();
    let id = |sa| SpiffeId::new(trust, "shop", sa).unwrap();
    let config = rig
        .identities
        .client(&id("client-sa"), &id("server-sa"))
        .unwrap();
    let socket = Socket::new(raw_connection(rig).into_std().unwrap()).unwrap();
    socket.connected().await.unwrap();
    let name = server_name(SERVER.parse().unwrap());
    let proven = |c: &_| Ok::<_, HandshakeFailure>(rig.identities.peer(c)?);
    let (secured, _peer) = tls::connect(&socket, &Unscheduled, config, name, proven)
        .await
        .unwrap();
    Tunnel::new(
        socket,
        secured,
        BufferAccount::new(Rc::default(), Arc::new(())),
    )
}

fn raw_connection(rig: &Rig) -> TcpStream {
    let from = format!("{CLIENT}:0").parse().unwrap();
    let to = format!("{SERVER}:{}", rig.tunnel_port.get())
        .parse()
        .unwrap();
    TcpStream::from_std(rig.net.connect(from, rig.net.real(to)).unwrap()).unwrap()
}

/// A valid OPEN frame.
fn open(route: &Route) -> Open {
    Open {
        destination: route.to.into(),
        source: at("10.244.0.2:40000"),
        service: None,
    }
}

async fn flush(tunnel: &mut Tunnel) {
    std::future::poll_fn(|cx| tunnel.poll_flush(cx))
        .await
        .unwrap();
}

async fn asked(tunnel: &mut Tunnel, open: Open) -> (StreamId, Control) {
    let stream = tunnel.begin().unwrap();
    tunnel.queue(stream, &Control::Open(open));
    flush(tunnel).await;
    let (of, answer) = tunnel.control().await.unwrap();
    assert_eq!(of, stream);
    (stream, answer)
}

fn local<T>(test: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(LocalSet::new().run_until(async {
            tokio::time::timeout(Duration::from_secs(30), test)
                .await
                .expect("the test hangs")
        }))
}

#[test]
fn invalid_open_is_refused_and_the_tunnel_goes_on() {
    local(async {
        let (rig, route) = Rig::new().await;
        let good = open(&route);
        let port = rig.tunnel_port.get();
        let lies = [
            (
                Open {
                    source: at("10.244.0.9:40000"),
                    ..good
                },
                Reason::Spoofed,
            ),
            (
                Open {
                    destination: at("10.244.1.4:80"),
                    ..good
                },
                Reason::NotTunnelled,
            ),
            (
                Open {
                    destination: at("127.0.0.1:80"),
                    ..good
                },
                Reason::NotTunnelled,
            ),
            (
                Open {
                    destination: at(&format!("{SERVER}:{port}")),
                    ..good
                },
                Reason::TunnelPort,
            ),
        ];
        let mut tunnel = tunnel(&rig).await;
        for (lie, reason) in lies {
            let (_, answer) = asked(&mut tunnel, lie).await;
            assert_eq!(
                answer,
                Control::Refused(CloseReason::new(reason)),
                "{lie:?}"
            );
            tunnel.end_stream();
        }
        let (_, answer) = asked(&mut tunnel, good).await;
        assert_eq!(answer, Control::Opened);
        let records = rig.far.records(4).await;
        assert!(records.iter().all(|r| r["verdict"] == "denied"));
    });
}

#[test]
fn mapped_ipv4_address_equals_the_address() {
    local(async {
        let (rig, route) = Rig::new().await;
        let mapped = |e: Endpoint| -> Endpoint {
            let at = std::net::SocketAddr::from(e);
            let std::net::IpAddr::V4(ip) = at.ip() else {
                panic!()
            };
            std::net::SocketAddr::from((ip.to_ipv6_mapped(), at.port())).into()
        };
        let good = open(&route);
        let open = Open {
            destination: mapped(good.destination),
            source: mapped(good.source),
            service: None,
        };
        let mut tunnel = tunnel(&rig).await;
        assert_eq!(asked(&mut tunnel, open).await.1, Control::Opened);
    });
}

/// Whether the peer ends the tunnel.
async fn is_ended(tunnel: &mut Tunnel) -> bool {
    loop {
        match tunnel.control().await {
            Ok((_, Control::Opened | Control::Refused(_) | Control::Reset(_))) => {}
            Ok(other) => panic!("{other:?}"),
            Err(TunnelError::Closed | TunnelError::Cut | TunnelError::Io(_)) => return true,
            Err(_) => return false,
        }
    }
}

#[test]
fn frames_out_of_order_end_the_tunnel() {
    local(async {
        let (rig, route) = Rig::new().await;
        let good = open(&route);
        type Say = fn(&mut Tunnel, Open);
        let cases: [(&str, Say); 7] = [
            ("data before any OPEN", |t, _| t.queue_data(1, b"x")),
            ("a stream that is not the next", |t, open| {
                t.queue(2, &Control::Open(open));
            }),
            ("OPEN twice", |t, open| {
                t.queue(1, &Control::Open(open));
                t.queue(1, &Control::Open(open));
            }),
            ("data of another stream", |t, open| {
                t.queue(1, &Control::Open(open));
                t.queue_data(2, b"x");
            }),
            ("data behind FIN", |t, open| {
                t.queue(1, &Control::Open(open));
                t.queue(1, &Control::Fin);
                t.queue_data(1, b"x");
            }),
            ("an answer", |t, open| {
                t.queue(1, &Control::Open(open));
                t.queue(1, &Control::Opened);
            }),
            ("an end without a beginning", |t, _| {
                t.queue(1, &Control::Fin)
            }),
        ];
        for (what, say) in cases {
            let mut tunnel = tunnel(&rig).await;
            say(&mut tunnel, good);
            flush(&mut tunnel).await;
            assert!(is_ended(&mut tunnel).await, "{what}");
        }
        // The server still serves new tunnels.
        let (mut client, mut server) = rig.pair(&route).await;
        client.write_all(b"x").await.unwrap();
        loop {
            // Connections of the cases above were accepted before.
            match server.read(&mut [0; 9]).await {
                Ok(1) => break,
                Ok(_) | Err(_) => server = route.application.accept().await.unwrap().0,
            }
        }
    });
}

#[test]
fn silent_or_invalid_handshakes_are_closed() {
    local(async {
        let (rig, _route) = Rig::with(Timing {
            handshake: Duration::from_millis(200),
            ..timing()
        })
        .await;
        let mut silent = raw_connection(&rig);
        let mut nonsense = raw_connection(&rig);
        nonsense.writable().await.unwrap();
        nonsense.write_all(&[0x55; 400]).await.unwrap();
        for stream in [&mut silent, &mut nonsense] {
            let mut rest = Vec::new();
            match stream.read_to_end(&mut rest).await {
                Ok(_) => {}
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset),
            }
        }
    });
}

/// The first flight of a client, which needs no certificate.
fn client_hello() -> Vec<u8> {
    let config = stranger();
    let name = server_name(SERVER.parse().unwrap());
    let mut connection = rustls::ClientConnection::new(config, name).unwrap();
    let mut hello = Vec::new();
    connection.write_tls(&mut hello).unwrap();
    hello
}

/// A client without a certificate.
fn stranger() -> Arc<rustls::ClientConfig> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    Arc::new(config)
}

const LIMIT_REACHED: &str = "mesh_tls_handshakes_total{role=\"server\",result=\"limit_reached\"}";
const TIMEOUT: &str = "mesh_tls_handshakes_total{role=\"server\",result=\"timeout\"}";

fn bounds(source: usize, unproven: usize) -> Timing {
    Timing {
        handshakes: admission::Bounds {
            source,
            unproven,
            ..admission::Bounds::default()
        },
        handshake: Duration::from_secs(4),
        ..timing()
    }
}

#[test]
fn silent_connections_are_bounded_per_source() {
    local(async {
        let (rig, route) = Rig::with(bounds(64, 5)).await;
        let mut silent: Vec<_> = (0..5).map(|_| raw_connection(&rig)).collect();
        for stream in &silent {
            stream.writable().await.unwrap();
        }
        let mut one_more = raw_connection(&rig);
        assert!(is_reset(&mut one_more).await);
        assert_eq!(rig.far.counted(LIMIT_REACHED, 1).await, 1);
        // After their timeout other connections are served again.
        for stream in &mut silent {
            assert!(matches!(stream.read(&mut [0; 9]).await, Ok(0) | Err(_)));
        }
        let (mut client, mut server) = rig.pair(&route).await;
        client.write_all(b"x").await.unwrap();
        server.read_u8().await.unwrap();
        assert_eq!(rig.far.counted(TIMEOUT, 5).await, 5);
    });
}

#[test]
fn abandoned_handshakes_hold_permits_until_their_timeout() {
    local(async {
        let (rig, route) = Rig::with(bounds(3, 1000)).await;
        let hello = client_hello();
        let mut begun = Vec::new();
        for _ in 0..3 {
            let mut stream = raw_connection(&rig);
            stream.writable().await.unwrap();
            stream.write_all(&hello).await.unwrap();
            // The server has answered: the handshake holds its permit.
            stream.read_u8().await.unwrap();
            begun.push(stream);
        }
        // So that the next one's time ends well after theirs.
        tokio::time::sleep(Duration::from_millis(1500)).await;
        let at = std::time::Instant::now();
        let (mut client, mut server) = rig.pair(&route).await;
        client.write_all(b"x").await.unwrap();
        server.read_u8().await.unwrap();
        let waited = at.elapsed();
        assert!(waited > Duration::from_millis(300), "{waited:?}");
        rig.far.counted(TIMEOUT, 3).await;
        // A pod without waiting handshakes grants a permit at once, even if clients of other pods are silent.
        let silent: Vec<_> = (0..100).map(|_| raw_connection(&rig)).collect();
        let at = std::time::Instant::now();
        rig.near.change(|plan| {
            let workload = plan.names.workloads.get_mut(&addr(SERVER)).unwrap();
            std::sync::Arc::make_mut(workload).uid = "so that a new tunnel is made".into();
        });
        rig.pair(&route).await;
        assert!(at.elapsed() < Duration::from_secs(3));
        drop(silent);
    });
}
