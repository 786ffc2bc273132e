//! What is done to the text of a template before it is compiled.

use super::Error;

/// The most bytes of a tag besides the strings in it. The engine takes time in proportion to the square of a tag's operators.
const MAX_TAG_BYTES: usize = 4096;

/// Rewrites the tags that Hugging Face adds to the language: `{% generation %}`, which marks what the assistant says, becomes
/// `{% with %}`, which has a scope of its own as well.
///
/// Tags keep their dashes and lines. Strings, comments and raw blocks are left as they are.
///
/// # Errors
/// [`Error::Template`] when a tag is too long.
pub(super) fn rewrite(source: &str) -> Result<String, Error> {
    let mut rewritten = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = next_tag(rest) {
        let (before, tag) = rest.split_at(start);
        rewritten.push_str(before);
        let end = match &tag[..2] {
            "{#" => tag.find("#}").map_or(tag.len(), |end| end + 2),
            _ => tag_end(tag).map_err(|reason| {
                let line = 1 + rewritten.matches('\n').count();
                Error::Template { line: Some(line), reason }
            })?,
        };
        let (tag, after) = tag.split_at(end);
        rest = after;
        match block_name(tag) {
            Some("generation") => rewritten.push_str(&tag.replacen("generation", "with", 1)),
            Some("endgeneration") => rewritten.push_str(&tag.replacen("endgeneration", "endwith", 1)),
            Some("raw") => {
                let end = raw_end(rest);
                rewritten.push_str(tag);
                rewritten.push_str(&rest[..end]);
                rest = &rest[end..];
            }
            _ => rewritten.push_str(tag),
        }
    }
    rewritten.push_str(rest);
    Ok(rewritten)
}

fn next_tag(text: &str) -> Option<usize> {
    text.as_bytes().windows(2).position(|pair| matches!(pair, b"{{" | b"{%" | b"{#"))
}

/// Returns the length of the tag that a text begins with, or of the text where the tag does not end.
fn tag_end(tag: &str) -> Result<usize, String> {
    let bytes = tag.as_bytes();
    let end: &[u8] = if bytes[1] == b'{' { b"}}" } else { b"%}" };
    let (mut index, mut depth, mut num_bytes) = (2, 0_i64, 0);
    while index < bytes.len() {
        if depth == 0 && bytes[index..].starts_with(end) {
            return Ok(index + 2);
        }
        let quote = bytes[index];
        match quote {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth -= 1,
            b'"' | b'\'' => {
                index += 1;
                while index < bytes.len() && bytes[index] != quote {
                    index += if bytes[index] == b'\\' { 2 } else { 1 };
                }
            }
            _ => {}
        }
        index += 1;
        num_bytes += 1;
        if num_bytes > MAX_TAG_BYTES {
            return Err(format!(
                "expected tags of at most {MAX_TAG_BYTES} bytes besides their strings, got a longer one"
            ));
        }
    }
    Ok(bytes.len())
}

/// Returns the first word of a block tag without its delimiters and dashes, if it is the only one.
fn block_name(tag: &str) -> Option<&str> {
    let inner = tag.strip_prefix("{%")?.strip_suffix("%}")?;
    let inner = inner.strip_prefix(['-', '+']).unwrap_or(inner);
    let inner = inner.strip_suffix(['-', '+']).unwrap_or(inner);
    Some(inner.trim())
}

/// Returns where the text of a raw block ends.
fn raw_end(text: &str) -> usize {
    let mut starts = text.match_indices("{%").map(|(start, _)| start);
    let is_end = |start: &usize| {
        let tag = &text[*start..];
        let end = tag.find("%}").map_or(tag.len(), |end| end + 2);
        block_name(&tag[..end]) == Some("endraw")
    };
    starts.find(is_end).unwrap_or(text.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generation_tags_are_rewritten() {
        let cases = [
            ("a{% generation %}b{% endgeneration %}c", "a{% with %}b{% endwith %}c"),
            ("{%- generation -%}\n{%+endgeneration+%}", "{%- with -%}\n{%+endwith+%}"),
            ("{%generation%}{%   endgeneration   -%}", "{%with%}{%   endwith   -%}"),
            ("{% set generation = 1 %}{{ generation }}", "{% set generation = 1 %}{{ generation }}"),
            ("{# {% generation %} #}", "{# {% generation %} #}"),
            ("{{ '{% generation %}' }}", "{{ '{% generation %}' }}"),
            (r"{{ '\'{% generation %}' }}", r"{{ '\'{% generation %}' }}"),
            (
                "{% raw %}{% generation %}{% endraw %}{% generation %}",
                "{% raw %}{% generation %}{% endraw %}{% with %}",
            ),
            ("{{ {'a': {'b': 1}} }}{% generation %}", "{{ {'a': {'b': 1}} }}{% with %}"),
            ("{ % generation % } {", "{ % generation % } {"),
            ("{% generation", "{% generation"),
            ("é{{ 'é}} {% generation %}é", "é{{ 'é}} {% generation %}é"),
            ("{{ '\\", "{{ '\\"),
        ];
        cases.into_iter().for_each(|(source, expected)| assert_eq!(rewrite(source).unwrap(), expected));
    }

    #[test]
    fn tags_are_bounded_but_not_their_strings() {
        let text = format!("\n\n{{{{ '{}' }}}}", "a".repeat(2 * MAX_TAG_BYTES));
        assert_eq!(rewrite(&text).unwrap(), text);
        let sum = format!("\n\n{{{{ a{} }}}}", "+a".repeat(MAX_TAG_BYTES / 2));
        let error = rewrite(&sum).unwrap_err().to_string();
        assert!(error.starts_with("chat template, line 3: expected tags of at most 4096 bytes"), "{error}");
    }
}
