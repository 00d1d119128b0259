//! A network link to a server that is slow, pauses, or breaks.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context;
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::time::Instant;

/// Bytes that pass at once.
const PIECE: usize = 16 << 10;

#[derive(Clone, Debug, Default)]
pub struct LinkOptions {
    /// Bytes a second, of all connections together.
    pub rate: Option<u64>,
    /// Nothing passes for so long, each time that so many bytes have passed.
    pub pauses: Option<(u64, Duration)>,
    /// A connection is cut when so many bytes have passed over it.
    pub breaks_after: Option<u64>,
}

#[derive(Debug)]
struct Shared {
    target: SocketAddr,
    options: LinkOptions,
    /// When the next piece may pass.
    free: Mutex<Instant>,
    passed: AtomicU64,
    broken: AtomicU64,
}

/// A running link, with a thread of its own. Ends when dropped.
pub struct Link {
    address: SocketAddr,
    shared: Arc<Shared>,
    runtime: Option<Runtime>,
}

impl Link {
    /// Starts listening, on behalf of `target`.
    pub fn start(target: SocketAddr, options: LinkOptions) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .context("the link's thread")?;
        let listener = runtime
            .block_on(TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))))
            .context("the link's port")?;
        let address = listener.local_addr().context("the link's address")?;
        let shared = Arc::new(Shared {
            target,
            options,
            free: Mutex::new(Instant::now()),
            passed: AtomicU64::new(0),
            broken: AtomicU64::new(0),
        });
        runtime.spawn(accept(listener, Arc::clone(&shared)));
        Ok(Self {
            address,
            shared,
            runtime: Some(runtime),
        })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// How many connections were cut.
    pub fn broken(&self) -> u64 {
        self.shared.broken.load(Ordering::Relaxed)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    while let Ok((near, _)) = listener.accept().await {
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            let Ok(far) = TcpStream::connect(shared.target).await else {
                return;
            };
            let (near_in, near_out) = near.into_split();
            let (far_in, far_out) = far.into_split();
            let count = Arc::new(AtomicU64::new(0));
            // Whichever direction ends, both do.
            tokio::select! {
                () = pass(near_in, far_out, &shared, &count) => {}
                () = pass(far_in, near_out, &shared, &count) => {}
            }
        });
    }
}

async fn pass(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, shared: &Shared, count: &AtomicU64) {
    let mut piece = vec![0; PIECE];
    loop {
        let Ok(length @ 1..) = from.read(&mut piece).await else {
            return;
        };
        let passed = count.fetch_add(length as u64, Ordering::Relaxed) + length as u64;
        if shared
            .options
            .breaks_after
            .is_some_and(|most| passed > most)
        {
            shared.broken.fetch_add(1, Ordering::Relaxed);
            return;
        }
        shared.wait(length as u64).await;
        if to.write_all(&piece[..length]).await.is_err() {
            return;
        }
    }
}

impl Shared {
    /// Waits until so many bytes may pass.
    async fn wait(&self, bytes: u64) {
        let before = self.passed.fetch_add(bytes, Ordering::Relaxed);
        let mut longer = Duration::ZERO;
        if let Some((every, pause)) = self.options.pauses
            && before / every != (before + bytes) / every
        {
            longer += pause;
        }
        if let Some(rate) = self.options.rate {
            longer += Duration::from_secs_f64(bytes as f64 / rate as f64);
        }
        if longer.is_zero() && self.options.pauses.is_none() {
            return;
        }
        let until = {
            let mut free = self.free.lock();
            *free = (*free).max(Instant::now()) + longer;
            *free
        };
        tokio::time::sleep_until(until).await;
    }
}
