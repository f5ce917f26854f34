//! Safetensors in one file or in shards with an index, read and written one tensor at a time.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bytemuck::Pod;
use candle_core::{CpuStorage, DType, Device, Storage, Tensor, WithDType};
use half::{bf16, f16};
use safetensors::tensor::{Metadata, TensorInfo};
use serde::Deserialize;
use serde_json::json;

use super::staged::{Sink, Staged};
use crate::tools::files::{self, inside};
use crate::{Error, Result};

/// A file of weights is split where it would grow beyond this, unless the user says otherwise.
pub const SHARD_BYTES: u64 = 5_000_000_000;
/// Of the safetensors format.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// The index of the largest models, with an entry for each of a hundred thousand tensors, has a third of it.
const MAX_INDEX_BYTES: u64 = 50_000_000;
/// Tensors are read, converted and written in pieces of about this size.
const PIECE_BYTES: usize = 32 << 20;

/// A tensor to be written, made piece by piece when its turn comes.
pub struct Entry<'a> {
    pub name: String,
    pub dtype: DType,
    pub shape: Vec<usize>,
    /// `rows` is asked for ranges that begin and end at multiples of this.
    pub rows_together: usize,
    /// Some rows (indices of the first dimension), of any type.
    pub rows: Box<dyn Fn(Range<usize>) -> Result<Tensor> + 'a>,
}

impl<'a> Entry<'a> {
    fn new(name: &str, tensor: &'a Tensor) -> Self {
        let rows = Box::new(|rows: Range<usize>| Ok(tensor.narrow(0, rows.start, rows.len())?));
        Self { name: name.to_owned(), dtype: tensor.dtype(), shape: tensor.dims().to_vec(), rows_together: 1, rows }
    }

    fn bytes(&self) -> u64 {
        (self.shape.iter().product::<usize>() * self.dtype.size_in_bytes()) as u64
    }

    /// Ranges of rows, each of about [`PIECE_BYTES`].
    fn pieces(&self) -> impl Iterator<Item = Range<usize>> {
        let row_bytes = self.shape[1..].iter().product::<usize>() * self.dtype.size_in_bytes();
        let n = (PIECE_BYTES / row_bytes.max(1) / self.rows_together).max(1) * self.rows_together;
        let end = self.shape[0];
        (0..end).step_by(n).map(move |start| start..(start + n).min(end))
    }
}

pub fn entries(tensors: &[(String, Tensor)]) -> Vec<Entry<'_>> {
    tensors.iter().map(|(name, tensor)| Entry::new(name, tensor)).collect()
}

/// Writes `{stem}.safetensors`, or where that would be larger than `shard_bytes`, shards and
/// `{stem}.safetensors.index.json`. `progress` hears of the bytes as they are written.
pub fn write(
    folder: &mut Staged,
    stem: &str,
    entries: Vec<Entry>,
    shard_bytes: u64,
    progress: &dyn Fn(u64),
) -> Result<()> {
    let total: u64 = entries.iter().map(Entry::bytes).sum();
    let mut shards: Vec<Vec<Entry>> = vec![Vec::new()];
    let mut filled = 0;
    for entry in entries {
        if filled > 0 && filled + entry.bytes() > shard_bytes {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += entry.bytes();
        shards.last_mut().expect("never empty").push(entry);
    }
    if shards.len() == 1 {
        let name = format!("{stem}.safetensors");
        return folder.write(&name, |sink| write_file(sink, shards.remove(0), progress));
    }
    let count = shards.len();
    let mut weight_map = BTreeMap::new();
    for (i, shard) in shards.into_iter().enumerate() {
        let name = format!("{stem}-{:05}-of-{count:05}.safetensors", i + 1);
        weight_map.extend(shard.iter().map(|entry| (entry.name.clone(), name.clone())));
        folder.write(&name, |sink| write_file(sink, shard, progress))?;
    }
    let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
    folder.write_bytes(&format!("{stem}.safetensors.index.json"), format!("{index:#}\n").as_bytes())
}

fn write_file(sink: &mut Sink, mut entries: Vec<Entry>, progress: &dyn Fn(u64)) -> Result<()> {
    // Wide types first, so that every tensor starts aligned.
    entries.sort_by(|a, b| b.dtype.size_in_bytes().cmp(&a.dtype.size_in_bytes()).then_with(|| a.name.cmp(&b.name)));
    let mut offset = 0;
    let infos = entries.iter().map(|entry| {
        let start = offset;
        offset += entry.bytes() as usize;
        let info = TensorInfo { dtype: entry.dtype.into(), shape: entry.shape.clone(), data_offsets: (start, offset) };
        (entry.name.clone(), info)
    });
    // Some readers insist on a format.
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let metadata = Metadata::new(Some(format), infos.collect()).map_err(candle_core::Error::from)?;
    let mut header = serde_json::to_vec(&metadata).expect("strings and numbers only");
    header.resize(header.len().next_multiple_of(8), b' ');

    sink.write(&(header.len() as u64).to_le_bytes())?;
    sink.write(&header)?;
    for entry in &entries {
        for rows in entry.pieces() {
            progress(write_tensor(sink, &(entry.rows)(rows)?.to_dtype(entry.dtype)?)?);
        }
    }
    Ok(())
}

/// Writes the elements; without a copy where they lie contiguous in host memory. Returns their bytes.
fn write_tensor(sink: &mut Sink, tensor: &Tensor) -> Result<u64> {
    let tensor = match tensor.device() {
        Device::Cpu => tensor.contiguous()?,
        // Of a view into a large buffer, only the view comes to the host.
        _ => tensor.force_contiguous()?.to_device(&Device::Cpu)?,
    };
    let (storage, layout) = tensor.storage_and_layout();
    let (start, end) = layout.contiguous_offsets().expect("made contiguous above");
    let bytes: &[u8] = match &*storage {
        Storage::Cpu(CpuStorage::F64(data)) => bytemuck::cast_slice(&data[start..end]),
        Storage::Cpu(CpuStorage::F32(data)) => bytemuck::cast_slice(&data[start..end]),
        Storage::Cpu(CpuStorage::F16(data)) => bytemuck::cast_slice(&data[start..end]),
        Storage::Cpu(CpuStorage::BF16(data)) => bytemuck::cast_slice(&data[start..end]),
        _ => return Err(Error::Checkpoint(format!("weights of type {:?} cannot be saved", tensor.dtype()))),
    };
    sink.write(bytes)?;
    Ok(bytes.len() as u64)
}

/// Safetensors files, opened and their headers checked; tensors are read when asked for.
///
/// The files stay open, so that what was opened can be read to the end even if the folder goes away.
pub struct TensorFiles {
    /// What the user named, for messages.
    pub path: PathBuf,
    files: Vec<OpenFile>,
    tensors: BTreeMap<String, (usize, TensorInfo)>,
}

struct OpenFile {
    path: PathBuf,
    file: File,
    data_start: u64,
}

impl TensorFiles {
    /// A `.safetensors` file, or a folder with `model.safetensors`, with shards and an index, or with any `.safetensors`.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if there are none, if a header is malformed, or if an index or a link leads out of the folder.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_files(path, weight_files(path)?)
    }

    pub fn open_files(path: &Path, files: Vec<PathBuf>) -> Result<Self> {
        let mut opened = Self { path: path.to_owned(), files: Vec::new(), tensors: BTreeMap::new() };
        for path in files {
            opened.add(path)?;
        }
        Ok(opened)
    }

    fn add(&mut self, path: PathBuf) -> Result<()> {
        let file = File::open(&path).map_err(Error::io("open", &path))?;
        let (data_start, metadata) = read_header(&path, &file)?;
        for (name, info) in metadata.tensors() {
            if self.tensors.insert(name.clone(), (self.files.len(), info.clone())).is_some() {
                return Err(fault(&path, format!("holds `{name}`, which another file holds too")));
            }
        }
        self.files.push(OpenFile { path, file, data_start });
        Ok(())
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name).map(|(_, info)| info)
    }

    /// Reads rows of a tensor (all of them for `None`), in the type it was stored in, to host memory. 8-bit floats come
    /// as the bytes that they are.
    pub fn read(&self, name: &str, rows: Option<Range<usize>>) -> Result<Tensor> {
        let Some((file, info)) = self.tensors.get(name) else {
            return Err(fault(&self.path, format!("has no tensor `{name}`")));
        };
        let file = &self.files[*file];
        match info.dtype {
            safetensors::Dtype::F64 => file.read::<f64>(info, rows),
            safetensors::Dtype::F32 => file.read::<f32>(info, rows),
            safetensors::Dtype::F16 => file.read::<f16>(info, rows),
            safetensors::Dtype::BF16 => file.read::<bf16>(info, rows),
            safetensors::Dtype::F8_E4M3 | safetensors::Dtype::U8 => file.read::<u8>(info, rows),
            other => {
                Err(fault(&file.path, format!("holds `{name}` as {other}, which are no weights that titan knows")))
            }
        }
    }
}

impl OpenFile {
    fn read<T: WithDType + Pod>(&self, info: &TensorInfo, rows: Option<Range<usize>>) -> Result<Tensor> {
        let mut shape = info.shape.clone();
        let (mut start, mut end) = info.data_offsets;
        if let Some(rows) = rows {
            let row_bytes = (end - start) / shape[0];
            shape[0] = rows.len();
            (start, end) = (start + rows.start * row_bytes, start + rows.end * row_bytes);
        }
        let mut data = vec![T::zeroed(); (end - start) / size_of::<T>()];
        self.file
            .read_exact_at(bytemuck::cast_slice_mut(&mut data), self.data_start + start as u64)
            .map_err(Error::io("read", &self.path))?;
        Ok(Tensor::from_vec(data, shape, &Device::Cpu)?)
    }
}

/// Where the data starts, and a header whose tensors fill the rest of the file without gap or overlap.
fn read_header(path: &Path, file: &File) -> Result<(u64, Metadata)> {
    let malformed = |what: String| fault(path, format!("is no safetensors file: {what}"));
    let read = |buffer: &mut [u8], at| file.read_exact_at(buffer, at).map_err(Error::io("read", path));

    let size = file.metadata().map_err(Error::io("read", path))?.len();
    if size < 8 {
        return Err(malformed(format!("it has {size} bytes")));
    }
    let mut length = [0; 8];
    read(&mut length, 0)?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER_BYTES.min(size - 8) {
        return Err(malformed(format!("its header claims {length} bytes of {size}")));
    }
    let mut header = vec![0; length as usize];
    read(&mut header, 8)?;
    if files::has_too_many_values(&header) {
        return Err(malformed("its header holds more values than that of any model".to_owned()));
    }
    let metadata: Metadata = serde_json::from_slice(&header).map_err(|error| malformed(error.to_string()))?;
    let data_start = 8 + length;
    let expected = data_start + metadata.data_len() as u64;
    if expected != size {
        return Err(malformed(format!("its header describes {expected} bytes, it has {size}")));
    }
    Ok((data_start, metadata))
}

/// The files of weights that `path` stands for, in order.
pub(super) fn weight_files(path: &Path) -> Result<Vec<PathBuf>> {
    const WHOLE: &str = "model.safetensors";
    const INDEX: &str = "model.safetensors.index.json";
    if path.is_file() {
        return Ok(vec![path.to_owned()]);
    }
    let names = if path.join(WHOLE).exists() {
        vec![WHOLE.to_owned()]
    } else if path.join(INDEX).exists() {
        let index = file_of(path, INDEX)?;
        let files = indexed_files(&index)?;
        if files.is_empty() {
            return Err(fault(&index, "names no files"));
        }
        files
    } else {
        listed_files(path)?
    };
    names.iter().map(|name| file_of(path, name)).collect()
}

/// The path of a file of `folder`, which must lie inside it.
pub(super) fn file_of(folder: &Path, name: &str) -> Result<PathBuf> {
    inside(folder, name)
        .map_err(|error| Error::Checkpoint(format!("{}: cannot open {name:?}: {error}", folder.display())))
}

/// The files that an index names.
fn indexed_files(index: &Path) -> Result<Vec<String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let text = files::read_json(index, MAX_INDEX_BYTES).map_err(Error::io("read", index))?;
    let found: Index = serde_json::from_slice(&text)
        .map_err(|error| fault(index, format!("is no index of tensors and their files: {error}")))?;
    Ok(found.weight_map.into_values().collect::<BTreeSet<_>>().into_iter().collect())
}

/// The names of all `.safetensors` of a folder, in order.
pub fn listed_files(folder: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(folder).map_err(Error::io("read", folder))?;
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.ends_with(".safetensors"))
        .collect();
    if names.is_empty() {
        let hint = match folder.join(".metadata").exists() {
            true => {
                "\n   = this is a checkpoint of PyTorch's; convert it to Hugging Face's format and set checkpoint.initial_load_in_hf"
            }
            false => "",
        };
        return Err(fault(folder, format!("holds no .safetensors files{hint}")));
    }
    names.sort();
    Ok(names)
}

fn fault(path: &Path, what: impl std::fmt::Display) -> Error {
    Error::Checkpoint(format!("{} {what}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensors() -> Vec<(String, Tensor)> {
        let ones = |n, dtype| Tensor::ones(n, dtype, &Device::Cpu).unwrap();
        let view = Tensor::arange(0f32, 12.0, &Device::Cpu).unwrap().reshape((3, 4)).unwrap().t().unwrap();
        vec![
            ("half".into(), ones(3, DType::BF16)),
            ("view".into(), view.narrow(0, 1, 2).unwrap()),
            ("double".into(), ones(5, DType::F64)),
        ]
    }

    fn written(shard_bytes: u64) -> (tempfile::TempDir, PathBuf) {
        let parent = tempfile::tempdir().unwrap();
        let mut staged = Staged::new(parent.path(), "weights").unwrap();
        write(&mut staged, "model", entries(&tensors()), shard_bytes, &|_| ()).unwrap();
        let path = staged.commit().unwrap();
        (parent, path)
    }

    fn assert_holds_the_tensors(path: &Path) {
        let files = TensorFiles::open(path).unwrap();
        assert_eq!(files.names().count(), 3);
        for (name, tensor) in tensors() {
            let read = files.read(&name, None).unwrap();
            assert_eq!((read.dtype(), read.dims()), (tensor.dtype(), tensor.dims()));
            let values = |t: &Tensor| t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
            assert_eq!(values(&read), values(&tensor), "{name}");
        }
    }

    #[test]
    fn views_and_every_float_type_come_back_as_they_were() {
        let (_parent, path) = written(SHARD_BYTES);
        assert_holds_the_tensors(&path);
        assert_holds_the_tensors(&path.join("model.safetensors"));
    }

    #[test]
    fn the_safetensors_crate_reads_what_is_written() {
        let (_parent, path) = written(SHARD_BYTES);
        let bytes = fs::read(path.join("model.safetensors")).unwrap();
        let parsed = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(parsed.tensor("view").unwrap().data(), bytemuck::cast_slice::<f32, u8>(&[1., 5., 9., 2., 6., 10.]));
    }

    #[test]
    fn shards_are_read_with_and_without_their_index() {
        let (_parent, path) = written(40);
        let names = listed_files(&path).unwrap();
        assert_eq!(names, ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]);
        assert_holds_the_tensors(&path);
        fs::remove_file(path.join("model.safetensors.index.json")).unwrap();
        assert_holds_the_tensors(&path);
    }

    #[test]
    fn malformed_files_are_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let header = |json: &str, data: usize| {
            let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
            bytes.extend(json.as_bytes());
            bytes.resize(bytes.len() + data, 0);
            bytes
        };
        let cases = [
            b"short".to_vec(),
            u64::MAX.to_le_bytes().to_vec(),
            header("{", 0),
            // Larger than the file, a hole, an overlap, a name twice, an overflowing shape.
            header(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 4),
            header(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#, 8),
            header(
                r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#,
                8,
            ),
            header(
                r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#,
                8,
            ),
            header(r#"{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}"#, 0),
        ];
        for bytes in cases {
            fs::write(&path, &bytes).unwrap();
            let message = TensorFiles::open(folder.path()).err().expect("refused").to_string();
            assert!(message.contains("model.safetensors is no safetensors file"), "{message}");
        }
    }

    #[test]
    fn an_index_or_a_link_cannot_lead_out_of_the_folder() {
        let (parent, path) = written(40);
        let secret = parent.path().join("secret.safetensors");
        fs::rename(path.join("model-00002-of-00002.safetensors"), &secret).unwrap();
        let write_index = |name: &str| {
            let index = json!({ "weight_map": { "view": name } });
            fs::write(path.join("model.safetensors.index.json"), index.to_string()).unwrap();
        };
        let refused = || TensorFiles::open(&path).err().expect("refused").to_string();
        for name in ["../secret.safetensors", secret.to_str().unwrap()] {
            write_index(name);
            assert!(refused().contains("leads out of its folder"), "{name}");
        }
        std::os::unix::fs::symlink(&secret, path.join("link.safetensors")).unwrap();
        write_index("link.safetensors");
        assert!(refused().contains("\"link.safetensors\": it leads out of its folder"), "{}", refused());
    }

    #[test]
    fn a_snapshot_of_the_hubs_cache_is_read_through_its_links() {
        let (parent, path) = written(SHARD_BYTES);
        let [snapshot, blobs] = ["snapshots/main", "blobs"].map(|name| parent.path().join(name));
        fs::create_dir_all(&snapshot).unwrap();
        fs::create_dir(&blobs).unwrap();
        fs::rename(path.join("model.safetensors"), blobs.join("hash")).unwrap();
        std::os::unix::fs::symlink("../../blobs/hash", snapshot.join("model.safetensors")).unwrap();
        assert_holds_the_tensors(&snapshot);
    }

    #[test]
    fn a_folder_of_pytorchs_says_how_to_convert_it() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(".metadata"), b"").unwrap();
        let message = TensorFiles::open(folder.path()).err().unwrap().to_string();
        assert!(message.contains("checkpoint.initial_load_in_hf"), "{message}");
    }
}
