//! Jobs that quantize or evaluate models.

use super::{Jobs, Requester, new_id};
use crate::gateway::error::ApiError;
use crate::gateway::registry::{MAX_NAME, check_name};
use crate::gateway::store::StoredJob;
use crate::gguf::Gguf;
use crate::job::spec::VERSION;
use crate::job::{
    EvalModel, EvaluateOrder, EvaluateSpec, Failure, JobOrder, QuantizeOrder, QuantizeSpec,
    ResourceEstimate,
};
use std::path::PathBuf;
use std::sync::Arc;

const IMATRIX: &str = "quantize.imatrix";

impl Jobs {
    pub(super) async fn admit_quantization(
        self: &Arc<Self>,
        mut spec: QuantizeSpec,
        requester: Requester,
    ) -> Result<StoredJob, ApiError> {
        let files = self.registry.model_files(&spec.model).await?;
        if files.adapter.is_some() {
            let message = format!(
                "`{}` is an adapter: train it with `export.merged`, and quantize the merged model.",
                spec.model
            );
            return Err(ApiError::invalid("model", message));
        }
        // A published name may stand for another model later.
        spec.model.clone_from(&files.name);
        let name = spec.new_name();
        check_name("name", &name)?;
        let jobs = self.clone();
        blocking(move || {
            jobs.check_new_name(&name)?;
            let model = header(&files.path, &spec.model)?;
            if let Some(tensor) = model.tensors().iter().find(|tensor| tensor.ty().is_quantized())
                && !spec.quantize.requantize
                && !spec.quantize.ty.copies()
            {
                let message = format!(
                    "`{}` is quantized already (`{}` is {}), and a second quantization loses more than \
                     one from the original weights: name the F16 or F32 model, or set \
                     quantize.requantize.",
                    spec.model,
                    tensor.name(),
                    tensor.ty().name()
                );
                return Err(ApiError::invalid("model", message));
            }
            jobs.check_room(&ResourceEstimate::of_quantization(&model, &spec.quantize))?;
            let file = spec.quantize.imatrix.as_ref().map(|id| {
                jobs.data_file(&id.to_string_lossy(), IMATRIX, &requester)
            });
            let file = file.transpose()?;
            let id = new_id("ftjob-");
            let imatrix = file.map(|file| jobs.keep_data(&id, &file, "imatrix")).transpose()?;
            let created = format!("Created quantization job: {id}");
            let (model, model_sha256) = (files.path, files.sha256);
            let order =
                QuantizeOrder { version: VERSION, id, spec, name, model, model_sha256, imatrix };
            jobs.put(&JobOrder::Quantize(order), requester, &created)
        })
        .await
    }

    pub(super) async fn admit_evaluation(
        self: &Arc<Self>,
        spec: EvaluateSpec,
        requester: Requester,
    ) -> Result<StoredJob, ApiError> {
        spec.check().map_err(|why| {
            let param = why.split_once(": ").map_or("evaluate", |(key, _)| key).to_owned();
            ApiError::invalid(&param, format!("{why}."))
        })?;
        // No request names an evaluation, so its name may contain spaces.
        if let Some(name) = &spec.name
            && (name.is_empty() || name.len() > MAX_NAME || name.chars().any(char::is_control))
        {
            let message = format!("name must be 1 to {MAX_NAME} bytes without control characters.");
            return Err(ApiError::invalid("name", message));
        }
        let mut models = Vec::with_capacity(spec.evaluate.models.len());
        for name in &spec.evaluate.models {
            models.push(self.eval_model(name, "evaluate.models").await?);
        }
        let reference = match &spec.evaluate.reference {
            Some(name) => Some(self.eval_model(name, "evaluate.reference").await?),
            None => None,
        };
        let jobs = self.clone();
        blocking(move || {
            let text = spec.evaluate.text.as_ref();
            let text = text.map(|file| jobs.data_file(file, "evaluate.text", &requester));
            let text = text.transpose()?.map_or(0, |file| file.bytes);
            let reference_model = reference.as_ref();
            let estimate =
                ResourceEstimate::of_evaluation(&spec.evaluate, &models, reference_model, text);
            let estimate = estimate.map_err(|why| {
                ApiError::unprocessable(format!("{why}.")).with_param("evaluate.models")
            })?;
            jobs.check_room(&estimate).map_err(|mut error| {
                if error.code.as_deref() == Some("disk_full") {
                    error.message += " Fewer evaluate.chunks need less.";
                    error.param = Some("evaluate.chunks".into());
                }
                error
            })?;
            let id = new_id("ftjob-");
            let keep = |file: &str, param: &str, name: &str| -> Result<PathBuf, ApiError> {
                jobs.keep_data(&id, &jobs.data_file(file, param, &requester)?, name)
            };
            // Every file is looked up before the first is linked.
            let tasks = spec.evaluate.tasks.iter().enumerate();
            let named = tasks.map(|(number, task)| {
                let param = format!("evaluate.tasks[{number}].file");
                (task.file.as_str(), param, format!("task-{number}"))
            });
            let text = spec.evaluate.text.iter();
            let text = text.map(|file| (file.as_str(), "evaluate.text".into(), "text".into()));
            let named: Vec<(&str, String, String)> = text.chain(named).collect();
            for (file, param, _) in &named {
                jobs.data_file(file, param, &requester)?;
            }
            let mut kept = named.iter().map(|(file, param, name)| keep(file, param, name));
            let text = spec.evaluate.text.as_ref().and_then(|_| kept.next()).transpose()?;
            let tasks = kept.collect::<Result<_, _>>()?;
            let (name, created) = (spec.new_name(), format!("Created evaluation job: {id}"));
            let order = EvaluateOrder {
                version: VERSION,
                id: id.clone(),
                spec,
                name,
                models,
                reference,
                text,
                tasks,
            };
            jobs.put(&JobOrder::Evaluate(order), requester, &created)
        })
        .await
    }

    /// A model or adapter to evaluate, which the parameter `param` names.
    ///
    /// # Errors
    /// 404 if there is none of that name.
    pub async fn eval_model(
        self: &Arc<Self>,
        name: &str,
        param: &str,
    ) -> Result<EvalModel, ApiError> {
        let files = self.registry.model_files(name).await;
        let files = files.map_err(|error| error.with_param(param))?;
        let (jobs, adapter) = (self.clone(), files.name.clone());
        let stored = blocking(move || jobs.store().adapter(&adapter).map_err(ApiError::internal));
        // The adapter of a checkpoint is listed without a digest.
        let adapter_sha256 = stored.await?.map(|stored| stored.sha256);
        Ok(EvalModel {
            // A reference to a model is another name for the same.
            name: if files.adapter.is_some() { files.name } else { files.model },
            file: files.path,
            sha256: files.sha256,
            adapter_sha256: adapter_sha256.filter(|sha256| !sha256.is_empty()),
            adapter: files.adapter,
        })
    }

    /// Reads the text and the tasks.
    pub(super) fn check_evaluation_files(&self, order: &EvaluateOrder) -> Result<(), Failure> {
        let plan = order.plan(&self.folder(&order.id));
        plan.map(drop).map_err(|fault| Failure {
            code: "invalid_data".into(),
            message: format!("{}: {}.", fault.param, fault.message),
            param: Some(fault.param),
        })
    }
}

fn header(path: &std::path::Path, name: &str) -> Result<Gguf, ApiError> {
    Gguf::open_header(path).map_err(|error| {
        ApiError::unprocessable(format!("The model `{name}` cannot be read: {error}."))
            .with_param("model")
    })
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(work).await.map_err(ApiError::internal)?
}
