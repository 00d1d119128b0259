//! What the kernel still holds of a connection's outgoing bytes.
//!
//! On a slow line, megabytes that were written to a socket wait in the kernel for minutes: a
//! transfer of which no byte is taken any more may well be moving. Linux tells in
//! `/proc/net/tcp` and `/proc/net/tcp6` (`proc_pid_net(5)`, Documentation/networking/proc_net_tcp)
//! how many bytes of each connection the peer has not acknowledged.

use std::net::{IpAddr, SocketAddr};

/// Bytes that were written and are not acknowledged; `None` where nobody can tell.
pub(super) async fn unacknowledged(local: SocketAddr, remote: SocketAddr) -> Option<u64> {
    // An IPv4 connection of an IPv6 socket is in the latter's table.
    for table in ["/proc/self/net/tcp", "/proc/self/net/tcp6"] {
        let Ok(text) = tokio::fs::read_to_string(table).await else {
            continue;
        };
        if let Some(bytes) = find(&text, local, remote) {
            return Some(bytes);
        }
    }
    None
}

/// `sl local_address rem_address st tx_queue:rx_queue …`, a line a connection.
fn find(table: &str, local: SocketAddr, remote: SocketAddr) -> Option<u64> {
    table.lines().skip(1).find_map(|line| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        if address(fields.next()?)? != local || address(fields.next()?)? != remote {
            return None;
        }
        let (sending, _) = fields.nth(1)?.split_once(':')?;
        u64::from_str_radix(sending, 16).ok()
    })
}

/// `0100007F:1F90`: 32-bit words in the machine's order, then the port.
fn address(text: &str) -> Option<SocketAddr> {
    let (host, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let mut bytes = Vec::new();
    for start in (0..host.len()).step_by(8) {
        let word = u32::from_str_radix(host.get(start..start + 8)?, 16).ok()?;
        bytes.extend(word.to_ne_bytes());
    }
    let host: IpAddr = match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok()?.into(),
        16 => <[u8; 16]>::try_from(bytes).ok()?.into(),
        _ => return None,
    };
    Some(SocketAddr::new(host.to_canonical(), port))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[tokio::test]
    async fn what_a_peer_does_not_read_is_told_and_what_it_has_read_is_not() {
        for host in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(host) else {
                continue;
            };
            let mut sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (mut receiver, _) = listener.accept().unwrap();
            let (local, remote) = (sender.local_addr().unwrap(), sender.peer_addr().unwrap());
            sender.set_nonblocking(true).unwrap();
            let mut sent = 0;
            while let Ok(bytes) = sender.write(&[0; 1 << 16]) {
                sent += bytes;
            }
            assert!(unacknowledged(local, remote).await.unwrap() > 0);
            receiver.read_exact(&mut vec![0; sent]).unwrap();
            while unacknowledged(local, remote).await != Some(0) {
                tokio::task::yield_now().await;
            }
            drop(receiver);
        }
    }

    #[test]
    fn a_table_that_nobody_can_read_tells_nothing() {
        let address = SocketAddr::from(([127, 0, 0, 1], 80));
        assert_eq!(
            find("head\n 0: 0100007F:0050 gibberish", address, address),
            None
        );
        assert_eq!(find("", address, address), None);
    }
}
