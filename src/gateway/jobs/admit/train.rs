//! Jobs that train.

use super::{Jobs, Requester, new_id};
use crate::dataset::{DataError, DatasetKind, check};
use crate::gateway::error::ApiError;
use crate::gateway::registry::ModelFiles;
use crate::gateway::store::{StoredFile, StoredJob};
use crate::job::spec::Spec;
use crate::job::{BaseModel, Failure, InitAdapter, Order, ResolveError, ResolvedJob, Sources};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Minimum number of examples of OpenAI's endpoint.
const LEAST_EXAMPLES: u64 = 10;

/// Names of the parameters in the API that the client uses, for errors.
struct Params {
    train: &'static str,
    validation: &'static str,
}

const OPENAI: Params = Params { train: "training_file", validation: "validation_file" };
const TEACHER: &str = "distill.teacher";
/// Name of the parameter for pairs labelled by people.
const HUMAN: &str = "data.human";
const ADMIN: Params = Params { train: "data.train", validation: "data.validation" };

impl Requester {
    fn params(&self) -> &'static Params {
        if self.request.is_some() { &OPENAI } else { &ADMIN }
    }
}

impl Jobs {
    pub(super) async fn admit_training(
        self: &Arc<Self>,
        spec: Spec,
        requester: Requester,
    ) -> Result<StoredJob, ApiError> {
        let sources = self.sources(&spec).await?;
        self.check_policy(&spec, &requester).await?;
        let jobs = self.clone();
        let admit = move || jobs.admit(spec, requester, sources);
        tokio::task::spawn_blocking(admit).await.map_err(ApiError::internal)?
    }

    /// Finds the models that a specification names.
    async fn sources(&self, spec: &Spec) -> Result<Sources, ApiError> {
        let mut sources = Sources::default();
        if let Some(name) = &spec.model {
            let ModelFiles { name, model, path, sha256, parent, adapter } =
                self.registry.model_files(name).await?;
            let adapter = adapter.map(|file| (name, file));
            sources.base = Some(BaseModel { name: model, path, sha256, parent, adapter });
        }
        if let Some(name) = spec.adapter.as_ref().and_then(|adapter| adapter.init.as_ref()) {
            let found = self.registry.model_files(name).await?;
            let path = found.adapter.ok_or_else(|| refused(&ResolveError::Init))?;
            sources.init = Some(InitAdapter { path, base: Some(found.model) });
        }
        if let Some(name) = spec.tokenizer_from() {
            sources.tokenizer = Some(self.registry.model_files(name).await?.path);
        }
        if let Some(name) = spec.task.settings().teacher() {
            let found = self.registry.model_files(name).await;
            let found = found.map_err(|error| error.with_param(TEACHER))?;
            if found.adapter.is_some() {
                let message = format!("{TEACHER}: `{name}` is an adapter; name a merged model.");
                return Err(ApiError::invalid(TEACHER, message));
            }
            sources.teacher = Some(found.path);
        }
        Ok(sources)
    }

    /// Checks that the models that a policy's job queries are loaded now.
    async fn check_policy(&self, spec: &Spec, requester: &Requester) -> Result<(), ApiError> {
        let models: Vec<(String, String, bool)> = {
            let task = &spec.task;
            if !task.settings().samples() {
                return Ok(());
            }
            let param = |key: &str| match &requester.request {
                Some(_) => "method.reinforcement.grader".to_owned(),
                None => format!("{}.{key}", task.name()),
            };
            let models = task.settings().models().into_iter();
            models.map(|(key, name, scores)| (param(&key), name.to_owned(), scores)).collect()
        };
        if let Some(model) = &spec.model {
            // The base model generates the completions, so it must be loaded too.
            self.registry.find(model).await?;
        }
        for (param, model, scores) in &models {
            if self.config.jobs.remote_models.iter().any(|remote| remote.name == *model) {
                let why = match (requester.admin, scores) {
                    (false, _) => {
                        "is a model of another server, which only the operator's jobs ask"
                    }
                    (true, true) => "is a model of another server, and no reward model",
                    (true, false) => continue,
                };
                return Err(ApiError::invalid(param, format!("{param}: `{model}` {why}.")));
            }
            let found = self.registry.find(model).await;
            let found = found.map_err(|error| error.with_param(param))?;
            let is = found.adapter.is_some_and(|adapter| adapter.is_reward_model());
            if is != *scores {
                let what = if *scores { "is no reward model" } else { "is a reward model" };
                let message = format!("{param}: `{model}` {what}.");
                return Err(ApiError::invalid(param, message));
            }
        }
        Ok(())
    }

    fn admit(
        &self,
        spec: Spec,
        requester: Requester,
        mut sources: Sources,
    ) -> Result<StoredJob, ApiError> {
        let params = requester.params();
        spec.resolve().map_err(|why| refused(&ResolveError::Spec(why)))?;
        let file = |id: &str, param: &str| self.data_file(id, param, &requester);
        let train = file(&spec.data.train, params.train)?;
        let validation =
            spec.data.validation.as_ref().map(|id| file(id, params.validation)).transpose()?;
        let human = spec.data.human.as_ref().map(|id| file(id, HUMAN)).transpose()?;
        sources.data_bytes = train.bytes + validation.as_ref().map_or(0, |file| file.bytes);
        let job = ResolvedJob::new(spec, sources).map_err(|error| refused(&error))?;
        if let Some(name) = &job.spec.name {
            self.check_new_name(name)?;
        }
        self.check_room(&job.estimate)?;
        let mut order = job.order(new_id("ftjob-"), PathBuf::new(), None);
        self.lay_out(&mut order, &train, validation.as_ref(), human.as_ref())?;
        let created = format!("Created fine-tuning job: {}", order.id);
        self.put(&order.into(), requester, &created)
    }

    /// Links the files of an order into the job's folder.
    fn lay_out(
        &self,
        order: &mut Order,
        train: &StoredFile,
        validation: Option<&StoredFile>,
        human: Option<&StoredFile>,
    ) -> Result<(), ApiError> {
        let id = order.id.clone();
        let keep = |file: &StoredFile, name: &str| self.keep_data(&id, file, name);
        order.train = keep(train, "train")?;
        order.validation = validation.map(|file| keep(file, "validation")).transpose()?;
        order.human = human.map(|file| keep(file, "human")).transpose()?;
        order.init = match order.init.take() {
            Some(path) if path.is_dir() => {
                for name in ["adapter_config.json", "adapter_model.safetensors"] {
                    self.keep(&id, &path.join(name), &format!("init/{name}"))?;
                }
                Some(self.folder(&id).path().join("init"))
            }
            Some(path) => Some(self.keep(&id, &path, "init.gguf")?),
            None => None,
        };
        Ok(())
    }

    pub(super) fn check_training_files(&self, order: &Order) -> Result<(), Failure> {
        let failure = |param: &str, error: &dyn std::fmt::Display| Failure {
            code: format!("invalid_{param}"),
            message: format!("The {} cannot be used: {error}.", param.replace('_', " ")),
            param: Some(param.to_owned()),
        };
        let Some(dataset) = order.spec.task.settings().dataset() else { return Ok(()) };
        let stored = self.store().job(&order.id).ok().flatten();
        let openai = stored.is_some_and(|job| job.request.is_some());
        let least = if openai { LEAST_EXAMPLES } else { 1 };
        let look = |path: &Path, param: &str, least: u64| -> Result<(), Failure> {
            check(path, dataset, least).map(drop).map_err(|error: DataError| failure(param, &error))
        };
        look(&order.train, OPENAI.train, least)?;
        if let Some(path) = &order.human {
            let checked = check(path, DatasetKind::Preference, 1).map(drop);
            checked.map_err(|error: DataError| failure(HUMAN, &error))?;
        }
        order.validation.as_ref().map_or(Ok(()), |path| look(path, OPENAI.validation, 1))
    }
}

/// 422 for a model that cannot be trained, else 400 with the wrong key.
fn refused(error: &ResolveError) -> ApiError {
    let message = format!("{error}.");
    let refused = match error {
        ResolveError::Model(_) => ApiError::unprocessable(message),
        _ => ApiError::bad_request(message),
    };
    match error.param() {
        Some(param) => refused.with_param(param),
        None => refused,
    }
}
