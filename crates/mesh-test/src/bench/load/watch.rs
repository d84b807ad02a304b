// SPDX-License-Identifier: Apache-2.0
//! A client that connects repeatedly and reports when the result changes, which shows the enforced
//! policy as seen from a pod.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// Pause between two connections.
const PAUSE: Duration = Duration::from_millis(2);
/// Timeout after which a connection counts as closed.
const ANSWER: Duration = Duration::from_millis(200);

/// Prints `open` or `closed`, at first and at each change, until killed.
#[expect(clippy::print_stdout, reason = "what a program reports")]
pub(super) fn run(to: SocketAddr) -> ! {
    let mut before = None;
    loop {
        let open = connects(to).is_ok();
        if before != Some(open) {
            println!("{}", if open { "open" } else { "closed" });
            before = Some(open);
        }
        std::thread::sleep(PAUSE);
    }
}

/// Connects and closes with a reset, so that no port stays in TIME_WAIT.
fn connects(to: SocketAddr) -> io::Result<()> {
    let stream = TcpStream::connect_timeout(&to, ANSWER)?;
    socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO))
}
