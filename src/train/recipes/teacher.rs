//! The teacher of a distillation, and the file of its distributions.

use super::Job;
use super::run::TrainError;
use crate::gguf::Gguf;
use crate::job::spec::{Distill, Lora, Resolved};
use crate::tokenizer::Tokenizer;
use crate::tokenizer::native::NativeTokenizer;
use crate::train::data::{Encoded, Prepared, pack};
use crate::train::model::{Batch, Model, Training};
use crate::train::ops::TeacherRows;
use candle_core::Device;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

/// Bytes of a token with its log-probability in the file.
const ENTRY: usize = 8;

/// A teacher.
pub(super) struct Teacher {
    model: Model,
    temperature: f64,
    pub(super) top_k: usize,
}

/// A model that is not trained.
pub(super) fn frozen(
    file: Arc<Gguf>,
    settings: &Resolved,
    device: &Device,
) -> Result<Model, TrainError> {
    let nothing = Lora {
        rank: 1,
        alpha: 1.0,
        targets: Vec::new(),
        rank_stabilized: false,
        dropout: 0.0,
        seed: 0,
    };
    Ok(Model::load(file, &Training::Lora(nothing), settings.max_length, device)?)
}

impl Teacher {
    /// # Errors
    /// If the model cannot be loaded, or has another tokenizer than the student.
    pub(super) fn load(
        path: &Path,
        block: &Distill,
        job: &Job<'_, Prepared>,
    ) -> Result<Self, TrainError> {
        let file = Arc::new(Gguf::open(path)?);
        let refuse = |why: String| TrainError::Spec(format!("distill.teacher: {why}"));
        let tokenizer = NativeTokenizer::from_gguf(&file).map_err(|why| refuse(why.to_string()))?;
        if let Some(why) = difference(&tokenizer, job.tokenizer) {
            return Err(refuse(format!(
                "its tokenizer is not the student's ({why}), so their distributions cannot be \
                 compared: train the student on answers of the teacher (kind `sft`)"
            )));
        }
        let model = frozen(file, job.settings, job.model.device())?;
        let (vocab, of_student) = (model.shape().vocab, job.model.shape().vocab);
        if vocab != of_student {
            let why = format!("its output has {vocab} tokens, the student's {of_student}");
            return Err(refuse(why));
        }
        Ok(Self { model, temperature: block.temperature, top_k: block.top_k.min(vocab) })
    }

    /// The distributions of the rows of a batch, which consists of the examples `numbers`. They are
    /// read from the cache if it has all of them. Otherwise they are all computed, and those that the
    /// cache lacks are added to it: an example keeps the bits of the first batch that had it, also
    /// when a stopped job resumes.
    pub(super) fn rows(
        &self,
        batch: &Batch,
        numbers: &[usize],
        cache: Option<&TeacherCache>,
    ) -> Result<TeacherRows, TrainError> {
        let Some(cache) = cache else {
            return Ok(self.model.teacher_rows(batch, self.temperature, self.top_k)?);
        };
        if let Some(found) = cache.get(numbers)? {
            return Ok(found);
        }
        let found = self.model.teacher_rows(batch, self.temperature, self.top_k)?;
        cache.put_missing(numbers, found)
    }

    /// The teacher's own loss of the data, in nats per token.
    pub(super) fn loss(&self, data: &Prepared, settings: &Resolved) -> Result<f64, TrainError> {
        let (mut sum, mut weight) = (0.0, 0.0);
        let all: Vec<usize> = (0..data.len()).collect();
        for some in all.chunks(settings.batch_size) {
            let lengths: Vec<usize> = some.iter().map(|&example| data.length(example)).collect();
            for rows in pack(&lengths, settings.max_length).chunks(settings.micro_batch) {
                let members = rows.iter().flat_map(|row| &row.members);
                let examples: Vec<Encoded> =
                    members.map(|&member| data.get(some[member])).collect::<Result<_, _>>()?;
                let batch = Batch::of(&examples);
                let loss = self.model.losses(&batch)?.sum.to_dtype(candle_core::DType::F64)?;
                sum += loss.to_scalar::<f64>()?;
                weight += batch.weights.iter().map(|weight| f64::from(*weight)).sum::<f64>();
            }
        }
        Ok(if weight > 0.0 { sum / weight } else { 0.0 })
    }
}

/// How two tokenizers differ.
fn difference(teacher: &dyn Tokenizer, student: &dyn Tokenizer) -> Option<String> {
    let (teacher, student) = (teacher.vocab(), student.vocab());
    if teacher.len() != student.len() {
        return Some(format!("{} tokens, and not {}", teacher.len(), student.len()));
    }
    let other = (0..student.len() as u32).find(|&id| teacher.piece(id) != student.piece(id))?;
    let shown = |piece: &[u8]| String::from_utf8_lossy(piece).into_owned();
    let (one, two) = (shown(teacher.piece(other)), shown(student.piece(other)));
    Some(format!("token {other} is {one:?}, and not {two:?}"))
}

/// A file with the teacher's distributions by example: for each predicted token `top_k` entries. An
/// entry is the token plus 1, and its log-probability; what was not computed yet is 0.
pub(super) struct TeacherCache {
    file: File,
    /// (examples + 1) first row of each example.
    offsets: Vec<u64>,
    top_k: usize,
}

impl TeacherCache {
    /// Opens the file of `data`, or creates it. It is as large as all distributions will be, but has
    /// holes until they are computed.
    pub(super) fn open(path: &Path, data: &Prepared, top_k: usize) -> io::Result<Self> {
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        let mut offsets = vec![0];
        let mut rows = 0;
        for example in 0..data.len() {
            rows += data.get(example)?.targets() as u64;
            offsets.push(rows);
        }
        file.set_len(rows * (top_k * ENTRY) as u64)?;
        Ok(Self { file, offsets, top_k })
    }

    fn place(&self, example: usize) -> (u64, usize) {
        let bytes = (self.top_k * ENTRY) as u64;
        let rows = self.offsets[example + 1] - self.offsets[example];
        (self.offsets[example] * bytes, (rows * bytes) as usize)
    }

    /// The distributions of these examples, if all of them are there.
    fn get(&self, examples: &[usize]) -> io::Result<Option<TeacherRows>> {
        let mut found = TeacherRows { top_k: self.top_k, ..TeacherRows::default() };
        for &example in examples {
            let Some(rows) = self.of_example(example)? else { return Ok(None) };
            found.tokens.extend(rows.tokens);
            found.log_probs.extend(rows.log_probs);
        }
        Ok(Some(found))
    }

    /// The distributions of an example, if all of them are there.
    fn of_example(&self, example: usize) -> io::Result<Option<TeacherRows>> {
        let mut found = TeacherRows { top_k: self.top_k, ..TeacherRows::default() };
        let (at, length) = self.place(example);
        let mut bytes = vec![0; length];
        self.file.read_exact_at(&mut bytes, at)?;
        for entry in bytes.as_chunks::<ENTRY>().0 {
            let [a, b, c, d, e, f, g, h] = *entry;
            let token = u32::from_le_bytes([a, b, c, d]);
            let Some(token) = token.checked_sub(1) else { return Ok(None) };
            found.tokens.push(token);
            found.log_probs.push(f32::from_le_bytes([e, f, g, h]));
        }
        Ok(Some(found))
    }

    /// Writes the distributions `rows` of the examples that are not there yet. Returns those of all of
    /// these examples, as the file has them now.
    fn put_missing(
        &self,
        examples: &[usize],
        rows: TeacherRows,
    ) -> Result<TeacherRows, TrainError> {
        let mut rows = rows;
        let mut start = 0;
        for &example in examples {
            let (at, length) = self.place(example);
            let range = start..start + length / ENTRY;
            start = range.end;
            if let Some(known) = self.of_example(example)? {
                rows.tokens[range.clone()].copy_from_slice(&known.tokens);
                rows.log_probs[range].copy_from_slice(&known.log_probs);
                continue;
            }
            let mut bytes = Vec::with_capacity(length);
            for (token, log_prob) in rows.tokens[range.clone()].iter().zip(&rows.log_probs[range]) {
                bytes.extend((token + 1).to_le_bytes());
                bytes.extend(log_prob.to_le_bytes());
            }
            self.file.write_all_at(&bytes, at)?;
        }
        Ok(rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An example keeps the distributions of the first batch that had it, whichever others are in a
    /// later one.
    #[test]
    fn examples_keep_their_first_distributions() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cache");
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path).unwrap();
        // Three examples with 1, 0 and 2 predicted tokens.
        let cache = TeacherCache { file, offsets: vec![0, 1, 1, 3], top_k: 2 };
        cache.file.set_len(3 * 2 * ENTRY as u64).unwrap();
        let rows = |tokens: &[u32], log_prob: f32| TeacherRows {
            top_k: 2,
            tokens: tokens.to_vec(),
            log_probs: vec![log_prob; tokens.len()],
        };
        assert_eq!(cache.get(&[0]).unwrap(), None);
        assert!(cache.get(&[1]).unwrap().unwrap().tokens.is_empty());
        let first = rows(&[5, 6], -1.0);
        assert_eq!(cache.put_missing(&[0], first.clone()).unwrap(), first);
        let later = rows(&[1, 2, 3, 4, 6, 5], -2.0);
        let right = TeacherRows {
            top_k: 2,
            tokens: vec![1, 2, 3, 4, 5, 6],
            log_probs: vec![-2.0, -2.0, -2.0, -2.0, -1.0, -1.0],
        };
        assert_eq!(cache.put_missing(&[2, 1, 0], later).unwrap(), right);
        assert_eq!(cache.get(&[2, 1, 0]).unwrap(), Some(right));
        assert_eq!(cache.get(&[0]).unwrap(), Some(first));
    }
}
