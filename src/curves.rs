//! `curves.svg`: exam scores over steps.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Result, anyhow};
use learner::EvalRecord;
use plotters::prelude::*;

pub(crate) fn write(path: &Path, evals: &[EvalRecord]) -> Result<()> {
    let mut by_exam = BTreeMap::<&str, Vec<(f64, f64)>>::new();
    for eval in evals {
        let share = 100.0 * eval.num_correct as f64 / eval.num_problems.max(1) as f64;
        by_exam.entry(&eval.exam).or_default().push((eval.step as f64, share));
    }
    let last_step = evals.iter().map(|eval| eval.step).max().unwrap_or(0).max(1) as f64;
    let draw = || -> Result<(), Box<dyn std::error::Error>> {
        let area = SVGBackend::new(path, (720, 420)).into_drawing_area();
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&area)
            .caption("dev exams, greedy pass@1", ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(36)
            .y_label_area_size(44)
            .build_cartesian_2d(0.0..last_step, 0.0..100.0)?;
        chart.configure_mesh().x_desc("step").y_desc("solved, %").draw()?;
        for (index, (exam, points)) in by_exam.into_iter().enumerate() {
            let color = Palette99::pick(index).to_rgba();
            chart
                .draw_series(LineSeries::new(points, color.stroke_width(2)))?
                .label(exam)
                .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 16, y)], color.stroke_width(2)));
        }
        chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK).draw()?;
        Ok(area.present()?)
    };
    draw().map_err(|error| anyhow!("write {}: {error}", path.display()))
}
