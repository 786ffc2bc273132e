use proto::CounterRng;

/// Draws an item in proportion to its weight. Not all weights are 0.
pub(crate) fn draw<'a, T>(rng: &mut CounterRng, items: &'a [T], weight: impl Fn(&T) -> f64) -> &'a T {
    let total: f64 = items.iter().map(&weight).sum();
    let mut at = rng.unit_f64() * total;
    let drawn = items.iter().find(|item| {
        at -= weight(item);
        at < 0.0
    });
    // Rounding may leave a remainder, which goes to the last item of positive weight.
    drawn.or(items.iter().rfind(|item| weight(item) > 0.0)).expect("some weight is over 0")
}
