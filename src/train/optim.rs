//! AdamW and Muon, in place and on all cores. Their state can be saved and restored bit for bit.

use crate::job::spec::Optimizer;
use crate::kernels::gemm::{Mat, product};
use crate::train::ops::uses_cpu_ops;
use candle_core::{CpuStorage, Device, InplaceOp2, Layout, Result, Tensor, Var, bail};
use rayon::prelude::*;
use std::collections::HashMap;
use std::sync::Mutex;

/// Numbers that a thread updates or sums at a time.
const CHUNK: usize = 1 << 14;
/// Iterations of Muon's orthogonalization, and the coefficients of its polynomial (Jordan 2024,
/// kellerjordan.github.io/posts/muon).
const ITERATIONS: usize = 5;
const POLYNOMIAL: [f32; 3] = [3.4445, -4.7750, 2.0315];

/// A trained parameter.
#[derive(Clone)]
pub struct Param {
    /// The tensor's name in the file that the parameter is exported to.
    pub name: String,
    pub var: Var,
    /// Whether weight decay applies: to matrices, not to norms.
    pub decays: bool,
    /// Whether the parameter is a matrix between hidden states, which Muon can optimize.
    pub hidden: bool,
}

/// An optimizer and its state for each parameter.
pub struct Optimization {
    settings: Optimizer,
    steps: u64,
    moments: HashMap<String, Moments>,
}

/// Running means of the gradients and of their squares. Muon has only the first.
enum Moments {
    Host(Vec<f32>, Vec<f32>),
    Device(Tensor, Option<Tensor>),
}

/// Metrics of a step.
#[derive(Debug, Clone, Copy)]
pub struct Stepped {
    /// Norm of the gradients before clipping.
    pub grad_norm: f64,
}

impl Optimization {
    pub fn new(settings: Optimizer) -> Self {
        Self { settings, steps: 0, moments: HashMap::new() }
    }

    /// Updates the parameters. The gradients are first divided by `tokens`, the weight of the whole
    /// accumulated batch. `factor` is the factor of the learning-rate schedule; parameters that
    /// AdamW updates have the rate `learning_rate` times `factor`.
    ///
    /// # Errors
    /// If the gradients are not finite; nothing is changed in this case.
    pub fn step(
        &mut self,
        params: &[Param],
        grads: &[Tensor],
        tokens: f64,
        learning_rate: f64,
        factor: f64,
    ) -> Result<Stepped> {
        // Runs on a thread of the rayon pool: from another thread, each parameter would wake the
        // pool and wait for it.
        rayon::scope(|_| self.step_here(params, grads, tokens, learning_rate, factor))
    }

    fn step_here(
        &mut self,
        params: &[Param],
        grads: &[Tensor],
        tokens: f64,
        learning_rate: f64,
        factor: f64,
    ) -> Result<Stepped> {
        let mut squares = 0.0;
        let grads: Vec<_> = grads.iter().map(|grad| grad.contiguous()).collect::<Result<_>>()?;
        for grad in &grads {
            squares += sum_of_squares(grad)?;
        }
        let grad_norm = squares.sqrt() / tokens;
        if !grad_norm.is_finite() {
            bail!("the gradients are not finite (their norm is {grad_norm})");
        }
        self.steps += 1;
        let (Optimizer::AdamW { clip, .. } | Optimizer::Muon { clip, .. }) = self.settings;
        let shrink = if clip > 0.0 && grad_norm > clip { clip / grad_norm } else { 1.0 };
        for (param, grad) in params.iter().zip(&grads) {
            self.update(param, grad, shrink / tokens, learning_rate, factor)?;
        }
        Ok(Stepped { grad_norm })
    }

    fn update(
        &mut self,
        param: &Param,
        grad: &Tensor,
        scale: f64,
        learning_rate: f64,
        factor: f64,
    ) -> Result<()> {
        let moments = match self.moments.get_mut(&param.name) {
            Some(moments) => moments,
            None => self.moments.entry(param.name.clone()).or_insert(Moments::zeros(&param.var)?),
        };
        match self.settings {
            Optimizer::Muon { learning_rate: rate, momentum, weight_decay, .. } if param.hidden => {
                let decay = rate * factor * weight_decay;
                let muon = Muon { rate: rate * factor, momentum, decay, scale };
                muon.update(&param.var, grad, moments)
            }
            Optimizer::AdamW { betas, eps, weight_decay, .. }
            | Optimizer::Muon { betas, eps, weight_decay, .. } => {
                let rate = learning_rate * factor;
                let decay = if param.decays { rate * weight_decay } else { 0.0 };
                let adam = AdamW { rate, decay, betas, eps, scale, steps: self.steps };
                adam.update(&param.var, grad, moments)
            }
        }
    }

    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The optimizer's state as named tensors, in the order of the parameters.
    ///
    /// # Errors
    /// If memory cannot be allocated.
    pub fn state(&self, params: &[Param]) -> Result<Vec<(String, Tensor)>> {
        let mut state = Vec::new();
        for param in params {
            let shape = param.var.shape();
            let (first, second) = match self.moments.get(&param.name) {
                Some(Moments::Host(m, v)) => (
                    Tensor::from_slice(m, shape, &Device::Cpu)?,
                    Some(Tensor::from_slice(v, shape, &Device::Cpu)?),
                ),
                Some(Moments::Device(m, v)) => (m.clone(), v.clone()),
                None => continue,
            };
            state.push((format!("{}.first", param.name), first));
            state.extend(second.map(|second| (format!("{}.second", param.name), second)));
        }
        Ok(state)
    }

    /// Restores the state that [`Optimization::state`] returned after this number of steps.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape.
    pub fn restore(
        &mut self,
        params: &[Param],
        steps: u64,
        state: &HashMap<String, Tensor>,
    ) -> Result<()> {
        self.steps = steps;
        self.moments.clear();
        for param in params.iter().filter(|_| steps > 0) {
            let find = |part: &str| {
                let name = format!("{}.{part}", param.name);
                let found = state.get(&name).filter(|found| found.shape() == param.var.shape());
                found.ok_or_else(|| candle_core::Error::msg(format!("`{name}` is missing")))
            };
            let device = param.var.device();
            let moments = match uses_cpu_ops(&param.var) {
                true => Moments::Host(
                    find("first")?.flatten_all()?.to_vec1()?,
                    find("second")?.flatten_all()?.to_vec1()?,
                ),
                false => Moments::Device(
                    find("first")?.to_device(device)?,
                    find("second").ok().map(|second| second.to_device(device)).transpose()?,
                ),
            };
            self.moments.insert(param.name.clone(), moments);
        }
        Ok(())
    }
}

impl Moments {
    fn zeros(var: &Var) -> Result<Self> {
        match uses_cpu_ops(var) {
            true => {
                let zeros = vec![0.0; var.elem_count()];
                Ok(Self::Host(zeros.clone(), zeros))
            }
            false => Ok(Self::Device(var.zeros_like()?, Some(var.zeros_like()?))),
        }
    }
}

/// Sums in chunks of a fixed size, in f64.
fn sum_of_squares(grad: &Tensor) -> Result<f64> {
    if !uses_cpu_ops(grad) {
        return grad.sqr()?.sum_all()?.to_dtype(candle_core::DType::F64)?.to_scalar();
    }
    let (storage, layout) = grad.storage_and_layout();
    let candle_core::Storage::Cpu(storage) = &*storage else { bail!("a gradient on no device") };
    let values = contiguous(storage.as_slice::<f32>()?, layout)?;
    let part = |part: &[f32]| {
        let (lanes, rest) = part.as_chunks::<8>();
        let mut sums = [0.0; 8];
        for lane in lanes {
            (0..8).for_each(|i| sums[i] += f64::from(lane[i]) * f64::from(lane[i]));
        }
        let rest: f64 = rest.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
        sums.iter().sum::<f64>() + rest
    };
    let parts: Vec<f64> = values.par_chunks(CHUNK).map(part).collect();
    Ok(parts.iter().sum())
}

fn contiguous<'a>(values: &'a [f32], layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((from, to)) => Ok(&values[from..to]),
        None => bail!("a parameter or gradient is not contiguous"),
    }
}

struct AdamW {
    rate: f64,
    decay: f64,
    betas: [f64; 2],
    eps: f64,
    scale: f64,
    steps: u64,
}

impl AdamW {
    /// Bias corrections: divisors of the running means, which start at zero.
    fn corrections(&self) -> [f64; 2] {
        let steps = i32::try_from(self.steps).unwrap_or(i32::MAX);
        self.betas.map(|beta| 1.0 - beta.powi(steps))
    }

    fn update(&self, var: &Var, grad: &Tensor, moments: &mut Moments) -> Result<()> {
        match moments {
            Moments::Host(m, v) => {
                let op =
                    Host { run: Mutex::new(|x: &mut [f32], g: &[f32]| self.on_host(x, g, m, v)) };
                var.as_tensor().inplace_op2(grad, &op)
            }
            Moments::Device(m, Some(v)) => {
                let ([b1, b2], [c1, c2]) = (self.betas, self.corrections());
                let grad = (grad * self.scale)?;
                *m = ((&*m * b1)? + (&grad * (1.0 - b1))?)?;
                *v = ((&*v * b2)? + (grad.sqr()? * (1.0 - b2))?)?;
                let root = ((&*v / c2)?.sqrt()? + self.eps)?;
                let change = ((&*m / c1)?.div(&root)? * self.rate)?;
                var.set(&((var.as_tensor() * (1.0 - self.decay))? - change)?)
            }
            Moments::Device(_, None) => bail!("the state is Muon's"),
        }
    }

    fn on_host(&self, x: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
        let [b1, b2] = self.betas.map(|beta| beta as f32);
        let [o1, o2] = self.betas.map(|beta| (1.0 - beta) as f32);
        let [c1, c2] = self.corrections();
        let (step, root) = ((self.rate / c1) as f32, (1.0 / c2.sqrt()) as f32);
        let (keep, eps, scale) = ((1.0 - self.decay) as f32, self.eps as f32, self.scale as f32);
        let means = m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK));
        let weights = x.par_chunks_mut(CHUNK).zip(g.par_chunks(CHUNK));
        weights.zip(means).for_each(|((x, g), (m, v))| {
            for (((x, &g), m), v) in x.iter_mut().zip(g).zip(m).zip(v) {
                let g = g * scale;
                *m = b1 * *m + o1 * g;
                *v = b2 * *v + o2 * g * g;
                *x = *x * keep - step * *m / (v.sqrt() * root + eps);
            }
        });
    }
}

struct Muon {
    rate: f64,
    momentum: f64,
    decay: f64,
    scale: f64,
}

impl Muon {
    fn update(&self, var: &Var, grad: &Tensor, moments: &mut Moments) -> Result<()> {
        let (rows, cols) = var.dims2()?;
        match moments {
            Moments::Host(m, _) => {
                let op = Host {
                    run: Mutex::new(|x: &mut [f32], g: &[f32]| self.on_host(x, g, m, rows, cols)),
                };
                var.as_tensor().inplace_op2(grad, &op)
            }
            Moments::Device(m, _) => {
                let grad = (grad * self.scale)?;
                *m = ((&*m * self.momentum)? + &grad)?;
                let ahead = (grad + (&*m * self.momentum)?)?;
                let change = (orthogonal_on_device(&ahead)? * (self.rate * stretch(rows, cols)))?;
                var.set(&((var.as_tensor() * (1.0 - self.decay))? - change)?)
            }
        }
    }

    fn on_host(&self, x: &mut [f32], g: &[f32], m: &mut [f32], rows: usize, cols: usize) {
        let (momentum, scale) = (self.momentum as f32, self.scale as f32);
        // Nesterov momentum: the value of the mean one step ahead.
        let ahead = m.iter_mut().zip(g).map(|(m, &g)| {
            let g = g * scale;
            *m = momentum * *m + g;
            g + momentum * *m
        });
        let change = orthogonal(ahead.collect(), rows, cols);
        let rate = (self.rate * stretch(rows, cols)) as f32;
        let keep = (1.0 - self.decay) as f32;
        x.iter_mut().zip(change).for_each(|(x, change)| *x = *x * keep - rate * change);
    }
}

fn stretch(rows: usize, cols: usize) -> f64 {
    (rows as f64 / cols as f64).max(1.0).sqrt()
}

/// The matrix (rows, columns) with all singular values near one, by the Newton–Schulz iteration.
fn orthogonal(mut x: Vec<f32>, rows: usize, cols: usize) -> Vec<f32> {
    let parts: Vec<f64> = x
        .par_chunks(CHUNK)
        .map(|part| part.iter().map(|x| f64::from(*x) * f64::from(*x)).sum())
        .collect();
    let norm = (parts.iter().sum::<f64>().sqrt() + 1e-7) as f32;
    x.iter_mut().for_each(|x| *x /= norm);
    // Uses the smaller of the two products with the transpose.
    let wide = rows <= cols;
    let n = rows.min(cols);
    let [a, b, c] = POLYNOMIAL;
    let (mut square, mut fourth) = (vec![0.0; n * n], vec![0.0; n * n]);
    let mut next = vec![0.0; x.len()];
    for _ in 0..ITERATIONS {
        let matrix = Mat::new(&x, rows, cols);
        let (left, right) = if wide { (matrix, matrix.t()) } else { (matrix.t(), matrix) };
        product(left, right, &mut square, n, 0, false);
        let s = Mat::new(&square, n, n);
        product(s, s, &mut fourth, n, 0, false);
        fourth
            .iter_mut()
            .zip(&square)
            .for_each(|(fourth, &square)| *fourth = b * square + c * *fourth);
        let factor = Mat::new(&fourth, n, n);
        let (left, right) = if wide { (factor, matrix) } else { (matrix, factor) };
        product(left, right, &mut next, cols, 0, false);
        x.iter_mut().zip(&next).for_each(|(x, &next)| *x = a * *x + next);
    }
    x
}

fn orthogonal_on_device(x: &Tensor) -> Result<Tensor> {
    let (rows, cols) = x.dims2()?;
    let norm = (x.sqr()?.sum_all()?.sqrt()? + 1e-7)?;
    let mut x = x.broadcast_div(&norm)?;
    let [a, b, c] = POLYNOMIAL.map(f64::from);
    if rows > cols {
        x = x.t()?.contiguous()?;
    }
    for _ in 0..ITERATIONS {
        let square = x.matmul(&x.t()?)?;
        let factor = ((&square * b)? + (square.matmul(&square)? * c)?)?;
        x = ((&x * a)? + factor.matmul(&x)?)?;
    }
    if rows > cols { x.t()?.contiguous() } else { Ok(x) }
}

/// A function that updates a parameter's numbers in place from its gradient.
struct Host<F> {
    run: Mutex<F>,
}

impl<F: FnMut(&mut [f32], &[f32])> InplaceOp2 for Host<F> {
    fn name(&self) -> &'static str {
        "optimizer"
    }

    fn cpu_fwd(&self, x: &mut CpuStorage, lx: &Layout, g: &CpuStorage, lg: &Layout) -> Result<()> {
        let CpuStorage::F32(x) = x else { bail!("parameters are f32") };
        let Some((from, to)) = lx.contiguous_offsets() else {
            bail!("a parameter is not contiguous")
        };
        let g = contiguous(g.as_slice::<f32>()?, lg)?;
        let Ok(run) = &mut self.run.lock() else { bail!("an update panicked") };
        run(&mut x[from..to], g);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn param(values: &[f32], rows: usize, hidden: bool) -> Param {
        let shape = (rows, values.len() / rows);
        let var = Var::from_slice(values, shape, &Device::Cpu).unwrap();
        Param { name: "w".into(), var, decays: true, hidden }
    }

    fn values(param: &Param) -> Vec<f32> {
        param.var.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// Gradients of (target - w)²/2.
    fn grads(param: &Param, target: f64) -> [Tensor; 1] {
        [(param.var.as_tensor() - target).unwrap().copy().unwrap()]
    }

    #[test]
    fn adamw_is_what_its_paper_says() {
        let param = param(&[1.0, -2.0, 0.5], 1, false);
        let settings =
            Optimizer::AdamW { betas: [0.9, 0.99], eps: 1e-8, weight_decay: 0.1, clip: 0.0 };
        let mut ours = Optimization::new(settings);
        let (mut w, mut m, mut v) = (vec![1.0f64, -2.0, 0.5], vec![0.0f64; 3], vec![0.0f64; 3]);
        for step in 1..=20 {
            ours.step(std::slice::from_ref(&param), &grads(&param, 3.0), 2.0, 0.05, 1.0).unwrap();
            for i in 0..3 {
                let g = (w[i] - 3.0) / 2.0;
                m[i] = 0.9 * m[i] + 0.1 * g;
                v[i] = 0.99 * v[i] + 0.01 * g * g;
                let (mh, vh) =
                    (m[i] / (1.0 - 0.9f64.powi(step)), v[i] / (1.0 - 0.99f64.powi(step)));
                w[i] = w[i] * (1.0 - 0.05 * 0.1) - 0.05 * mh / (vh.sqrt() + 1e-8);
            }
        }
        for (got, right) in values(&param).iter().zip(w) {
            assert!((f64::from(*got) - right).abs() < 1e-5, "{got}, not {right}");
        }
    }

    /// The updates of other devices are those of the CPU.
    #[test]
    fn updates_composed_of_operations_are_the_same() {
        for settings in [Optimizer::default(), serde_json::from_str(r#"{"name": "muon"}"#).unwrap()]
        {
            let run = || {
                let param = param(&[1.0, -2.0, 0.5, 3.0, 0.1, 0.2], 2, true);
                let list = std::slice::from_ref(&param);
                let mut ours = Optimization::new(settings.clone());
                for step in 0..8 {
                    if step == 4 {
                        let state = ours.state(list).unwrap().into_iter().collect();
                        ours = Optimization::new(settings.clone());
                        ours.restore(list, 4, &state).unwrap();
                    }
                    ours.step(list, &grads(&param, 1.0), 2.0, 0.01, 1.0).unwrap();
                }
                values(&param)
            };
            for (ours, other) in run().iter().zip(crate::train::ops::composed(run)) {
                assert!((ours - other).abs() < 1e-5, "{ours}, composed {other}");
            }
        }
    }

    #[test]
    fn gradients_are_clipped_by_their_norm_together() {
        let param = param(&[0.0, 0.0], 1, false);
        let mut ours = Optimization::new(Optimizer::default());
        let stepped =
            ours.step(std::slice::from_ref(&param), &grads(&param, 30.0), 1.0, 0.1, 1.0).unwrap();
        assert!((stepped.grad_norm - 30.0 * 2f64.sqrt()).abs() < 1e-4);
        let Some(Moments::Host(m, _)) = ours.moments.get("w") else { panic!("it is on the CPU") };
        assert!((m[0] + 0.1 / 2f32.sqrt()).abs() < 1e-6, "{m:?}");
    }

    #[test]
    fn what_is_not_finite_changes_nothing() {
        let param = param(&[1.0, f32::MAX], 1, false);
        let mut ours = Optimization::new(Optimizer::default());
        let bad = grads(&param, -3e38);
        assert!(ours.step(std::slice::from_ref(&param), &bad, 1.0, 0.1, 1.0).is_err());
        assert_eq!(values(&param), [1.0, f32::MAX]);
        assert_eq!(ours.steps(), 0);
    }

    #[test]
    fn muon_makes_singular_values_of_one() {
        for (rows, cols) in [(24, 40), (40, 24)] {
            let x: Vec<f32> =
                (0..rows * cols).map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0).collect();
            let q = orthogonal(x, rows, cols);
            let n = rows.min(cols);
            let mut square = vec![0.0; n * n];
            let q = Mat::new(&q, rows, cols);
            let (left, right) = if rows <= cols { (q, q.t()) } else { (q.t(), q) };
            product(left, right, &mut square, n, 0, false);
            for i in 0..n {
                // The singular values end between 0.7 and 1.2; the matrix holds their squares.
                assert!((0.3..1.6).contains(&square[i * n + i]), "{}", square[i * n + i]);
            }
        }
    }

    #[test]
    fn a_restored_state_goes_on_with_the_same_bits() {
        for settings in [Optimizer::default(), serde_json::from_str(r#"{"name": "muon"}"#).unwrap()]
        {
            let run = |interrupted: bool| {
                let param = param(&[1.0, -2.0, 0.5, 3.0, 0.1, 0.2], 2, true);
                let list = std::slice::from_ref(&param);
                let mut ours = Optimization::new(settings.clone());
                for step in 0..8 {
                    if interrupted && step == 4 {
                        let state = ours.state(list).unwrap().into_iter().collect();
                        ours = Optimization::new(settings.clone());
                        ours.restore(list, 4, &state).unwrap();
                    }
                    ours.step(list, &grads(&param, 1.0), 1.0, 0.01, 1.0).unwrap();
                }
                values(&param)
            };
            assert_eq!(run(false), run(true));
        }
    }
}
