//! Formulas over the graders of a `multi`: `0.8 * correct + 0.2 * max(short, 0.5)`.
//!
//! A formula consists of `+ - * / ^`, parentheses, numbers, the graders' keys, and the functions of
//! [`FUNCTIONS`]. `^` binds more tightly than a sign and is right-associative: `-2^2` is −4,
//! `2^3^2` is 2⁹. A formula is stored in postfix form, so that its evaluation needs no recursion;
//! the depth of parsing is bounded by [`DEEPEST`].

use super::{Fault, Flag};

/// Maximum length of a formula, in bytes.
pub(super) const LONGEST: usize = 4096;
/// Maximum length of a key, in bytes.
pub(super) const LONGEST_NAME: usize = 64;
const DEEPEST: usize = 64;

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Formula {
    source: String,
    steps: Vec<Step>,
}

/// A step of the postfix form.
#[derive(Clone, Debug, PartialEq)]
enum Step {
    Number(f64),
    /// The value of the grader with this index.
    Variable(usize),
    Negate,
    Binary(char),
    /// A function and the number of its arguments.
    Call(Function, usize),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Function {
    Min,
    Max,
    Abs,
    Floor,
    Ceil,
    Exp,
    Sqrt,
    /// The natural logarithm.
    Log,
}

const FUNCTIONS: [(&str, Function); 8] = [
    ("min", Function::Min),
    ("max", Function::Max),
    ("abs", Function::Abs),
    ("floor", Function::Floor),
    ("ceil", Function::Ceil),
    ("exp", Function::Exp),
    ("sqrt", Function::Sqrt),
    ("log", Function::Log),
];

/// Whether a grader's key can be used in a formula.
pub(super) fn is_variable(name: &str) -> bool {
    name.len() <= LONGEST_NAME
        && name.starts_with(starts_name)
        && name.chars().all(in_name)
        && !FUNCTIONS.iter().any(|(function, _)| *function == name)
}

fn starts_name(c: char) -> bool {
    c.is_ascii_alphabetic() || c == '_'
}

fn in_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

impl Formula {
    /// Parses a formula over these keys; the error describes what is wrong.
    pub(super) fn parse(source: String, keys: &[&str]) -> Result<Self, String> {
        let mut parser = Parser { rest: &source, keys, steps: Vec::new(), depth: 0 };
        parser.sum()?;
        parser.skip();
        if !parser.rest.is_empty() {
            return Err(parser.expected("an operator or the end"));
        }
        let steps = parser.steps;
        Ok(Self { source, steps })
    }

    pub(super) fn source(&self) -> &str {
        &self.source
    }

    /// Evaluates the formula for these values of the graders. Every step must have a finite result.
    pub(super) fn value(&self, values: &[f64]) -> Result<f64, Fault> {
        let fault = |why: String| Fault::new(Flag::Formula, why);
        let mut stack: Vec<f64> = Vec::new();
        for step in &self.steps {
            // The parser ensures that each step has as many operands as it takes.
            let mut pop = || stack.pop().unwrap_or(f64::NAN);
            let value = match step {
                Step::Number(number) => *number,
                Step::Variable(index) => values.get(*index).copied().unwrap_or(f64::NAN),
                Step::Negate => -pop(),
                Step::Binary(operator) => {
                    let right = pop();
                    let left = pop();
                    binary(*operator, left, right)
                }
                Step::Call(function, count) => {
                    let first = pop();
                    (1..*count).fold(function.of(first), |so_far, _| function.with(so_far, pop()))
                }
            };
            if !value.is_finite() {
                return Err(fault(format!("the formula {} has no finite value", self.source)));
            }
            stack.push(value);
        }
        stack.pop().ok_or_else(|| fault("the formula is empty".to_owned()))
    }
}

fn binary(operator: char, left: f64, right: f64) -> f64 {
    match operator {
        '+' => left + right,
        '-' => left - right,
        '*' => left * right,
        '/' => left / right,
        _ => left.powf(right),
    }
}

impl Function {
    fn of(self, x: f64) -> f64 {
        match self {
            Self::Min | Self::Max => x,
            Self::Abs => x.abs(),
            Self::Floor => x.floor(),
            Self::Ceil => x.ceil(),
            Self::Exp => x.exp(),
            Self::Sqrt => x.sqrt(),
            Self::Log => x.ln(),
        }
    }

    /// Adds one argument to a function of any number of arguments.
    fn with(self, so_far: f64, x: f64) -> f64 {
        if self == Self::Min { so_far.min(x) } else { so_far.max(x) }
    }
}

struct Parser<'a> {
    rest: &'a str,
    keys: &'a [&'a str],
    steps: Vec<Step>,
    depth: usize,
}

impl<'a> Parser<'a> {
    fn skip(&mut self) {
        self.rest = self.rest.trim_start();
    }

    /// Takes the next character if it is one of these.
    fn take(&mut self, any: &[char]) -> Option<char> {
        self.skip();
        let next = self.rest.chars().next().filter(|next| any.contains(next))?;
        self.rest = &self.rest[next.len_utf8()..];
        Some(next)
    }

    /// Takes characters as long as `holds` is true.
    fn take_while(&mut self, holds: impl Fn(char) -> bool) -> &'a str {
        let end = self.rest.find(|c| !holds(c)).unwrap_or(self.rest.len());
        let (taken, rest) = self.rest.split_at(end);
        self.rest = rest;
        taken
    }

    fn expected(&self, what: &str) -> String {
        match self.rest.chars().next() {
            None => format!("it ends where {what} should stand"),
            Some(_) => {
                let start: String = self.rest.chars().take(20).collect();
                format!("{what} should stand where it says {start}")
            }
        }
    }

    fn sum(&mut self) -> Result<(), String> {
        self.depth += 1;
        if self.depth > DEEPEST {
            return Err(format!("it is nested more than {DEEPEST} deep"));
        }
        self.product()?;
        while let Some(operator) = self.take(&['+', '-']) {
            self.product()?;
            self.steps.push(Step::Binary(operator));
        }
        self.depth -= 1;
        Ok(())
    }

    fn product(&mut self) -> Result<(), String> {
        self.signed()?;
        while let Some(operator) = self.take(&['*', '/']) {
            self.signed()?;
            self.steps.push(Step::Binary(operator));
        }
        Ok(())
    }

    fn signed(&mut self) -> Result<(), String> {
        let mut negative = false;
        while let Some(sign) = self.take(&['+', '-']) {
            negative ^= sign == '-';
        }
        self.atom()?;
        if self.take(&['^']).is_some() {
            self.depth += 1;
            if self.depth > DEEPEST {
                return Err(format!("it is nested more than {DEEPEST} deep"));
            }
            self.signed()?;
            self.depth -= 1;
            self.steps.push(Step::Binary('^'));
        }
        if negative {
            self.steps.push(Step::Negate);
        }
        Ok(())
    }

    fn atom(&mut self) -> Result<(), String> {
        if self.take(&['(']).is_some() {
            self.sum()?;
            return self.close();
        }
        match self.rest.chars().next() {
            Some(c) if c.is_ascii_digit() || c == '.' => self.number(),
            Some(c) if starts_name(c) => {
                let name = self.take_while(in_name);
                self.named(name)
            }
            _ => Err(self.expected("a number, a grader or a parenthesis")),
        }
    }

    fn close(&mut self) -> Result<(), String> {
        self.take(&[')']).map(drop).ok_or_else(|| self.expected("an operator or `)`"))
    }

    fn number(&mut self) -> Result<(), String> {
        let whole = self.rest;
        self.take_while(|c| c.is_ascii_digit() || c == '.');
        let exponent = self
            .rest
            .strip_prefix(['e', 'E'])
            .map(|rest| rest.strip_prefix(['+', '-']).unwrap_or(rest));
        if let Some(exponent) =
            exponent.filter(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
        {
            self.rest = exponent;
            self.take_while(|c| c.is_ascii_digit());
        }
        let written = &whole[..whole.len() - self.rest.len()];
        let number = written.parse().ok().filter(|number: &f64| number.is_finite());
        let number = number.ok_or_else(|| format!("{written} is no number"))?;
        self.steps.push(Step::Number(number));
        Ok(())
    }

    /// Parses a function with its arguments, or a grader's key.
    fn named(&mut self, name: &str) -> Result<(), String> {
        let function = FUNCTIONS.iter().find(|(function, _)| *function == name);
        let Some((_, function)) = function else {
            let index = self.keys.iter().position(|key| *key == name).ok_or_else(|| {
                let functions = FUNCTIONS.map(|(name, _)| name).join(", ");
                let keys = self.keys.join(", ");
                let name: String = name.chars().take(LONGEST_NAME).collect();
                format!("{name} is no grader here: there are {keys}, and the functions {functions}")
            })?;
            self.steps.push(Step::Variable(index));
            return Ok(());
        };
        if self.take(&['(']).is_none() {
            return Err(format!("{name} is a function: ( should follow"));
        }
        let mut count = 0;
        loop {
            self.sum()?;
            count += 1;
            if self.take(&[',']).is_none() {
                break;
            }
        }
        self.close()?;
        let many = matches!(function, Function::Min | Function::Max);
        if many != (count > 1) {
            let takes = if many { "two or more arguments" } else { "one argument" };
            return Err(format!("{name} takes {takes}, not {count}"));
        }
        self.steps.push(Step::Call(*function, count));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEYS: [&str; 3] = ["a", "b", "long_name2"];

    fn value(formula: &str) -> Result<f64, Fault> {
        let formula = Formula::parse(formula.to_owned(), &KEYS).unwrap();
        formula.value(&[2.0, 0.5, -3.0])
    }

    #[test]
    fn formulas_have_their_values() {
        for (formula, expected) in [
            ("a", 2.0),
            (" 0.8 * a + 0.2*b ", 1.7),
            ("a - b - 1", 0.5),
            ("a / b / 4", 1.0),
            ("1 + a * 3", 7.0),
            ("(1 + a) * 3", 9.0),
            ("-a^2", -4.0),
            ("2^-1", 0.5),
            ("2^3^2", 512.0),
            ("(-a)^2", 4.0),
            ("--a", 2.0),
            ("3 - -a", 5.0),
            ("2*-a", -4.0),
            ("min(a, b)", 0.5),
            ("max(a, b, long_name2, 7)", 7.0),
            ("min(3, 2, 1)", 1.0),
            ("abs(long_name2)", 3.0),
            ("floor(b) + ceil(b)", 1.0),
            ("exp(0) + sqrt(4) + log(1)", 3.0),
            ("1e2 + 1.5E-1 + .5", 100.65),
            ("max(min(a,1),(b))", 1.0),
            ("7", 7.0),
        ] {
            let got = value(formula).unwrap();
            assert!((got - expected).abs() < 1e-12, "{formula}: {got}");
        }
    }

    #[test]
    fn what_is_not_finite_is_a_fault() {
        for formula in [
            "1 / 0",
            "a / (b - 0.5)",
            "sqrt(long_name2)",
            "log(0)",
            "exp(1000)",
            "10 ^ 400",
            "long_name2 ^ b",
            "min(1, log(-1))",
            "0 * (1 / 0)",
        ] {
            assert_eq!(value(formula).unwrap_err().flag, Flag::Formula, "{formula}");
        }
    }

    #[test]
    fn what_is_no_formula_is_refused() {
        for (formula, why) in [
            ("", "it ends where a number"),
            ("a +", "it ends where"),
            ("a b", "an operator or the end should stand where it says b"),
            ("(a", "`)`"),
            ("a)", "it says )"),
            ("c + a", "c is no grader here: there are a, b, long_name2, and the functions min"),
            ("min", "( should follow"),
            ("min(a)", "two or more arguments"),
            ("abs(a, b)", "one argument"),
            ("abs()", "a number, a grader"),
            ("1.2.3", "1.2.3 is no number"),
            (".", ". is no number"),
            ("1e999", "is no number"),
            ("a % b", "it says % b"),
            ("a ** b", "it says * b"),
            ("a\u{2212}b", "an operator"),
            ("é", "it says é"),
            ("2a", "it says a"),
        ] {
            let error = Formula::parse(formula.to_owned(), &KEYS).unwrap_err();
            assert!(error.contains(why), "{formula}: {error}");
        }
    }

    #[test]
    fn work_is_bounded() {
        let nested = format!("{}a{}", "(".repeat(2000), ")".repeat(2000));
        assert!(Formula::parse(nested, &KEYS).unwrap_err().contains("deep"));
        assert!(
            Formula::parse(format!("a{}", "^a".repeat(2000)), &KEYS).unwrap_err().contains("deep")
        );
        assert!(Formula::parse("abs(".repeat(1000), &KEYS).unwrap_err().contains("deep"));
        assert_eq!(value(&format!("{}a", "-".repeat(4000))), Ok(2.0));
        assert_eq!(value(&format!("0{}", "+1".repeat(2000))), Ok(2000.0));
    }

    #[test]
    fn keys_are_names() {
        for key in ["a", "_x", "A9", "minimum"] {
            assert!(is_variable(key), "{key}");
        }
        let long = "k".repeat(LONGEST_NAME + 1);
        for key in ["", "9a", "a-b", "a b", "é", "min", "log", long.as_str()] {
            assert!(!is_variable(key), "{key}");
        }
    }
}
