// SPDX-License-Identifier: Apache-2.0
//! Connects again and again and says when the answer changes: what is in force, seen from a pod.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// Between two connections.
const PAUSE: Duration = Duration::from_millis(2);
/// What is not answered is closed.
const ANSWER: Duration = Duration::from_millis(200);

/// Prints `open` or `closed`, at first and at each change, until it is killed.
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

/// Ends with a reset, so that no port waits for a minute after it.
fn connects(to: SocketAddr) -> io::Result<()> {
    let stream = TcpStream::connect_timeout(&to, ANSWER)?;
    socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO))
}
