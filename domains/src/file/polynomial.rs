//! Polynomials with integer coefficients, within bounds.

use std::collections::BTreeMap;

use num_bigint::BigInt;
use num_traits::{One as _, Zero as _};

/// Most terms of a polynomial.
const MAX_TERMS: usize = 128;
/// Most bits of a coefficient.
const MAX_BITS: u64 = 4_096;
/// Largest total degree of a term.
const MAX_DEGREE: u32 = 256;
/// Most work on one expression, in products of 64-bit words.
const MAX_WORK: u64 = 1 << 20;
/// Work on one variable of a monomial.
const VARIABLE_WORK: u64 = 32;

/// Variables with their exponents over 0, in order.
type Monomial = Vec<(String, u32)>;

/// A polynomial in its one form: every monomial once, without coefficients of 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Polynomial(BTreeMap<Monomial, BigInt>);

/// The work that is left.
#[derive(Debug)]
pub(super) struct Fuel(u64);

/// An expression whose value is too large to be computed.
#[derive(Debug)]
pub(super) struct TooLarge;

impl Default for Fuel {
    fn default() -> Fuel {
        Fuel(MAX_WORK)
    }
}

impl Fuel {
    fn spend(&mut self, work: u64) -> Result<(), TooLarge> {
        self.0 = self.0.checked_sub(work).ok_or(TooLarge)?;
        Ok(())
    }
}

impl Polynomial {
    pub(super) fn constant(value: BigInt) -> Polynomial {
        Polynomial(BTreeMap::from_iter((!value.is_zero()).then(|| (Vec::new(), value))))
    }

    pub(super) fn one() -> Polynomial {
        Polynomial::constant(BigInt::one())
    }

    pub(super) fn variable(name: &str) -> Polynomial {
        Polynomial(BTreeMap::from([(vec![(name.to_owned(), 1)], BigInt::one())]))
    }

    pub(super) fn is_zero(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the value if there is no variable.
    pub(super) fn value(&self) -> Option<BigInt> {
        match self.0.first_key_value() {
            None => Some(BigInt::zero()),
            Some((monomial, value)) => (self.0.len() == 1 && monomial.is_empty()).then(|| value.clone()),
        }
    }

    pub(super) fn negate(mut self) -> Polynomial {
        self.0.values_mut().for_each(|value| *value = -std::mem::take(value));
        self
    }

    pub(super) fn add(mut self, other: &Polynomial, fuel: &mut Fuel) -> Result<Polynomial, TooLarge> {
        for (monomial, value) in &other.0 {
            fuel.spend(1 + value.bits() / 64 + VARIABLE_WORK * monomial.len() as u64)?;
            add_term(&mut self.0, monomial.clone(), value.clone());
        }
        self.within_bounds()
    }

    pub(super) fn multiply(&self, other: &Polynomial, fuel: &mut Fuel) -> Result<Polynomial, TooLarge> {
        let mut product = BTreeMap::new();
        for (left, left_value) in &self.0 {
            for (right, right_value) in &other.0 {
                let [left_bits, right_bits] = [left_value.bits(), right_value.bits()];
                if left_bits + right_bits > MAX_BITS + 1 {
                    return Err(TooLarge);
                }
                let num_variables = (left.len() + right.len()) as u64;
                fuel.spend((2 + left_bits / 64) * (2 + right_bits / 64) + VARIABLE_WORK * num_variables)?;
                add_term(&mut product, multiply_monomials(left, right), left_value * right_value);
            }
            if product.len() > MAX_TERMS {
                return Err(TooLarge);
            }
        }
        Polynomial(product).within_bounds()
    }

    /// Raises to a power by repeated squaring.
    pub(super) fn power(&self, mut exponent: u32, fuel: &mut Fuel) -> Result<Polynomial, TooLarge> {
        let (mut square, mut power) = (self.clone(), Polynomial::one());
        while exponent > 0 {
            if exponent % 2 == 1 {
                power = power.multiply(&square, fuel)?;
            }
            exponent /= 2;
            if exponent > 0 {
                square = square.multiply(&square, fuel)?;
            }
        }
        Ok(power)
    }

    fn within_bounds(self) -> Result<Polynomial, TooLarge> {
        let degree = |monomial: &Monomial| monomial.iter().map(|(_, exponent)| *exponent).sum::<u32>();
        let fits = self.0.len() <= MAX_TERMS
            && self.0.iter().all(|(monomial, value)| value.bits() <= MAX_BITS && degree(monomial) <= MAX_DEGREE);
        if fits { Ok(self) } else { Err(TooLarge) }
    }
}

fn add_term(terms: &mut BTreeMap<Monomial, BigInt>, monomial: Monomial, value: BigInt) {
    let sum = terms.remove(&monomial).unwrap_or_default() + value;
    if !sum.is_zero() {
        terms.insert(monomial, sum);
    }
}

fn multiply_monomials(left: &Monomial, right: &Monomial) -> Monomial {
    let mut exponents = BTreeMap::<&String, u32>::new();
    for (name, exponent) in left.iter().chain(right) {
        *exponents.entry(name).or_default() += exponent;
    }
    exponents.into_iter().map(|(name, exponent)| (name.clone(), exponent)).collect()
}
