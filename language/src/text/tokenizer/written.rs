//! Tokenizers as files of Hugging Face, for models whose own files are of another format.

use serde_json::{Map, Value, json};
use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, TokenizerBuilder};

use super::hugging_face::{CONFIG, TOKENIZER};
use super::{LibraryError, Tokenizer, unfit};
use crate::Error;

impl Tokenizer {
    /// Writes `tokenizer.json` and `tokenizer_config.json`, with which transformers encodes as this tokenizer does. Returns them by
    /// name. It has to spell bytes as GPT-2 does, as all tokenizers of GGUF files that are read do.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the library cannot write it.
    pub fn hugging_face_files(&self) -> Result<[(&'static str, Vec<u8>); 2], Error> {
        let refused = |error: LibraryError| unfit(TOKENIZER, "a tokenizer that can be written", error.to_string());
        let whole = TokenizerBuilder::<_, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, _>::new()
            .with_model(self.model.clone())
            .with_normalizer(self.normalizer.clone())
            .with_pre_tokenizer(self.pre_tokenizer.clone())
            .with_post_processor(self.begin_of_text()?)
            .with_decoder(Some(DecoderWrapper::from(ByteLevel::default())))
            .with_added_vocabulary(self.added.clone())
            .build()
            .map_err(refused)?;
        let whole = serde_json::to_vec(&whole).map_err(|error| refused(error.into()))?;
        let named = self.named.iter().map(|(name, text)| (name.clone(), json!(text)));
        let mut config: Map<String, Value> = named.collect();
        config.insert("tokenizer_class".to_owned(), json!("PreTrainedTokenizerFast"));
        config.insert("clean_up_tokenization_spaces".to_owned(), json!(false));
        config.extend(self.add_bos.iter().map(|adds| ("add_bos_token".to_owned(), json!(adds))));
        config.extend(self.chat_template.iter().map(|template| ("chat_template".to_owned(), json!(template))));
        let config = serde_json::to_vec_pretty(&config).map_err(|error| refused(error.into()))?;
        Ok([(TOKENIZER, whole), (CONFIG, config)])
    }

    /// Returns the step that puts `bos_token` before a text that no chat template wrote, if the model's files ask for it.
    fn begin_of_text(&self) -> Result<Option<PostProcessorWrapper>, Error> {
        let begin = self.named.get("bos_token").filter(|_| self.add_bos == Some(true));
        let Some((text, id)) = begin.and_then(|text| Some((text, self.special_id(text)?))) else { return Ok(None) };
        let refused = |error: LibraryError| unfit(TOKENIZER, "a bos_token that can be written", error.to_string());
        let pieces = vec![text.clone(), "$A".to_owned()];
        let mut step = TemplateProcessing::builder();
        step.try_single(pieces).map_err(|error| refused(error.into()))?.special_tokens(vec![(text.clone(), id)]);
        let step = step.build().map_err(|error| refused(error.into()))?;
        Ok(Some(step.into()))
    }
}
