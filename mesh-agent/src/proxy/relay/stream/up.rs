//! From the application into the tunnel.

use std::io::IoSlice;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tokio::task::yield_now;
use tokio::time::timeout;

use super::super::buffer::{Buffer, SLOT, Size};
use super::super::socket::{self, Room};
use super::super::{Cut, Rounds};
use super::{Common, Pace, blocked};
use crate::proxy::stream::{DATA, MAX_DATA, Message};
use crate::proxy::tls::{HEADER, Writer};

/// How long ACCEPTED waits for something to go along with.
const SOON: Duration = Duration::from_millis(1);

/// Until the application sends no more.
pub(super) fn up<'a>(
    common: &'a Common<'_>,
    writer: &'a mut Writer,
    owed: bool,
) -> impl Future<Output = Result<(), Cut>> + Send {
    async move {
        if owed {
            blocked(answer(common, writer)).await?;
        }
        let (mut pace, mut rounds) = (Pace::new(), Rounds::default());
        loop {
            if rounds.over() {
                yield_now().await;
            }
            socket::readable(common.application).await.map_err(Cut::Application)?;
            let mut buffer = common.budget.take(pace.size());
            let read = {
                let (mut slices, slots) = buffer.data();
                socket::read(common.application, &mut slices[..slots])
            };
            let Some(read) = read.map_err(Cut::Application)? else { continue };
            if read == 0 {
                drop(buffer);
                blocked(end(common, writer)).await?;
                common.sent_end.set(true);
                return Ok(());
            }
            pace.moved(read, buffer.size);
            let sealed = seal(writer, &mut buffer, read)?;
            let written = write_now(common, &buffer.bytes[..sealed])?;
            if written < sealed {
                blocked(write(common, &buffer.bytes[written..sealed])).await?;
            }
            let emptied = read < buffer.room();
            drop(buffer);
            common.sent.fetch_add(read as u64, Relaxed);
            // After the data: a key may seal a few records more than its limit says.
            if writer.is_due() {
                blocked(due(common, writer)).await?;
            }
            if emptied {
                writer.rest();
            }
        }
    }
}

/// Sends ACCEPTED: along with what the application says first, if it does so soon. That wakes the client's node once instead of twice.
async fn answer(common: &Common<'_>, writer: &mut Writer) -> Result<(), Cut> {
    let soon = timeout(SOON, socket::readable(common.application)).await;
    let mut buffer = common.budget.take(Size::Small);
    let read = match soon {
        Ok(ready) => {
            ready.map_err(Cut::Application)?;
            let (mut slices, slots) = buffer.data();
            socket::read(common.application, &mut slices[..slots]).map_err(Cut::Application)?
        }
        Err(_elapsed) => None,
    };
    let mut records = writer.due()?.unwrap_or_default();
    records.extend(writer.data(&Message::Accepted.encode())?);
    // Its end is for those to see who go on.
    if let Some(read @ 1..) = read {
        let sealed = seal(writer, &mut buffer, read)?;
        records.extend_from_slice(&buffer.bytes[..sealed]);
        common.sent.fetch_add(read as u64, Relaxed);
    }
    drop(buffer);
    write(common, &records).await?;
    // It may be all for long.
    writer.rest();
    Ok(())
}

/// Makes records of the first bytes in a buffer's slots, one after the other, and says how long they are together.
fn seal(writer: &mut Writer, buffer: &mut Buffer, read: usize) -> Result<usize, Cut> {
    let (mut end, mut left) = (0, read);
    for slot in buffer.bytes.chunks_mut(SLOT) {
        let length = left.min(MAX_DATA);
        slot[HEADER] = DATA;
        end += writer.seal(slot, length + 1)?;
        left -= length;
        if left == 0 {
            break;
        }
    }
    Ok(end)
}

async fn end(common: &Common<'_>, writer: &mut Writer) -> Result<(), Cut> {
    let record = writer.data(&Message::End.encode())?;
    write(common, &record).await?;
    due(common, writer).await
}

async fn due(common: &Common<'_>, writer: &mut Writer) -> Result<(), Cut> {
    match writer.due()? {
        Some(record) => write(common, &record).await,
        None => Ok(()),
    }
}

/// Writes what fits, and says how much that was.
fn write_now(common: &Common<'_>, bytes: &[u8]) -> Result<usize, Cut> {
    let mut done = 0;
    while done < bytes.len() {
        match socket::write(common.tunnel, &[IoSlice::new(&bytes[done..])]).map_err(Cut::Tunnel)? {
            Some(written) => done += written,
            None => break,
        }
    }
    common.within_record.set(done < bytes.len());
    Ok(done)
}

async fn write(common: &Common<'_>, mut bytes: &[u8]) -> Result<(), Cut> {
    loop {
        bytes = &bytes[write_now(common, bytes)?..];
        if bytes.is_empty() {
            return Ok(());
        }
        match socket::room(common.tunnel, common.application).await {
            Room::Some => {}
            Room::Failed(error) => return Err(Cut::Application(error)),
        }
    }
}
