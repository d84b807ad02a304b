// SPDX-License-Identifier: Apache-2.0
//! Finds pods through the container runtime interface (CRI): requests the pod's sandbox and its process.
//!
//! Serves runtimes whose processes are not below the kubelet's cgroups, such as those with virtual machines.
//! A request can take long, so a separate thread sends it: the first call for a pod starts the request, and a
//! later call returns the result. The caller compares the addresses of the namespace.

mod wire;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, TrySendError, sync_channel};
use std::thread;
use std::time::Duration;

use mesh_plan::plan::LocalPod;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};
use tonic_prost::ProstCodec;

use self::wire::{
    Filter, LIST, ListRequest, ListResponse, STATUS, State, StatusRequest, StatusResponse,
};
use super::super::Error;
use super::Find;

/// The time limit of the requests for one pod.
const ANSWER: Duration = Duration::from_secs(5);
/// The most pods whose requests wait. If the queue is full, a later call for the pod tries again.
const QUEUE: usize = 64;
/// The sandbox label that contains the pod's UID.
const UID: &str = "io.kubernetes.pod.uid";
/// The entry of a verbose sandbox status that contains the PID, in containerd and CRI-O.
const INFO: &str = "info";

/// Finds pods through a container runtime.
#[derive(Debug)]
pub struct ByCri {
    proc: PathBuf,
    socket: PathBuf,
    questions: SyncSender<String>,
    answers: Receiver<(String, Answer)>,
    /// Results by pod UID until a call returns them; `None` = the request is pending.
    known: RefCell<BTreeMap<String, Option<Answer>>>,
}

/// The PID of the pod's sandbox, or the reason why it is not known.
type Answer = Result<u32, String>;

impl ByCri {
    /// Creates a finder for a runtime's socket, and a proc file system that shows the runtime's processes.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn new(proc: impl Into<PathBuf>, socket: impl Into<PathBuf>) -> io::Result<Self> {
        let socket = socket.into();
        let (questions, asked) = sync_channel::<String>(QUEUE);
        let (answer, answers) = sync_channel(QUEUE);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let at = socket.clone();
        thread::Builder::new()
            .name("mesh-cri".to_owned())
            .spawn(move || {
                // Both channels close when the finder is dropped.
                while let Ok(uid) = asked.recv() {
                    let found = runtime.block_on(process(&at, &uid));
                    if answer.send((uid, found)).is_err() {
                        return;
                    }
                }
            })?;
        Ok(Self {
            proc: proc.into(),
            socket,
            questions,
            answers,
            known: RefCell::default(),
        })
    }
}

impl Find for ByCri {
    fn path(&self, uid: &str, pod: &LocalPod) -> Result<PathBuf, Error> {
        let uid = pod.static_uid.as_deref().unwrap_or(uid);
        let refused = |why: String| Error::Runtime {
            socket: self.socket.clone(),
            why,
        };
        let mut known = self.known.borrow_mut();
        loop {
            match self.answers.try_recv() {
                Ok((uid, answer)) => drop(known.insert(uid, Some(answer))),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => {
                    return Err(refused("the request thread exited".to_owned()));
                }
            }
        }
        match known.remove(uid) {
            Some(Some(Ok(process))) => {
                return Ok(self.proc.join(process.to_string()).join("ns/net"));
            }
            Some(Some(Err(why))) => return Err(refused(why)),
            Some(None) => drop(known.insert(uid.to_owned(), None)),
            None => match self.questions.try_send(uid.to_owned()) {
                Ok(()) => drop(known.insert(uid.to_owned(), None)),
                Err(TrySendError::Full(_)) => {}
                Err(TrySendError::Disconnected(_)) => {
                    return Err(refused("the request thread exited".to_owned()));
                }
            },
        }
        Err(refused("request pending".to_owned()))
    }

    fn is_of_a_process(&self) -> bool {
        true
    }
}

async fn process(socket: &Path, uid: &str) -> Answer {
    let asked = tokio::time::timeout(ANSWER, ask(socket, uid)).await;
    asked.unwrap_or_else(|_elapsed| Err("request timed out".to_owned()))
}

async fn ask(socket: &Path, uid: &str) -> Answer {
    let channel = Endpoint::from_shared(format!("unix://{}", socket.display()))
        .map_err(|error| error.to_string())?
        .connect()
        .await
        .map_err(|error| mesh_log::Chain(&error).to_string())?;
    let mut runtime = Grpc::new(channel);
    let ready = Filter {
        state: Some(State {
            state: State::READY,
        }),
        labels: BTreeMap::from([(UID.to_owned(), uid.to_owned())]),
    };
    let list = ListRequest {
        filter: Some(ready),
    };
    let found: ListResponse = call(&mut runtime, LIST, list).await?;
    let newest = found.items.into_iter().max_by_key(|one| one.created_at);
    let id = newest.ok_or("no sandbox of the pod")?.id;
    let status = StatusRequest { id, verbose: true };
    let status: StatusResponse = call(&mut runtime, STATUS, status).await?;
    let info = status
        .info
        .get(INFO)
        .ok_or("no PID in the sandbox status")?;
    process_of(info).ok_or_else(|| "no PID in the sandbox status".to_owned())
}

async fn call<Q, A>(runtime: &mut Grpc<Channel>, method: &'static str, what: Q) -> Result<A, String>
where
    Q: prost::Message + 'static,
    A: prost::Message + Default + 'static,
{
    let said = |status: Status| format!("{}: {}", status.code(), status.message());
    let ready = runtime.ready().await;
    ready.map_err(|error| mesh_log::Chain(&error).to_string())?;
    let codec = ProstCodec::<Q, A>::default();
    let path = PathAndQuery::from_static(method);
    let answer = runtime.unary(Request::new(what), path, codec).await;
    Ok(answer.map_err(said)?.into_inner())
}

/// Returns the PID in the runtime's JSON. The PID of a stopped sandbox is 0, which counts as none.
fn process_of(info: &str) -> Option<u32> {
    let info: serde_json::Value = serde_json::from_str(info).ok()?;
    let process = info.get("pid")?.as_u64()?;
    u32::try_from(process).ok().filter(|process| *process > 0)
}

#[cfg(test)]
mod tests;
