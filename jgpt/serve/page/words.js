"use strict";
// What the page says, in English and Chinese. The browser's first language decides.
const WORDS = {
  en: {
    new: "New", save: "Save", settings: "Settings", send: "Send", stop: "Stop", undo: "Undo", continue: "Continue",
    copy: "Copy", copied: "Copied", edit: "Edit", retry: "Retry", cancel: "Cancel", done: "Done",
    defaults: "Defaults", system: "System prompt", temperature: "Temperature", max_tokens: "Tokens at most",
    repetition_penalty: "Repetition penalty", seed: "Seed", random: "random", token: "Token of the server",
    empty_means: "An empty field takes the model's own value.",
    ask: "Ask something", begin: "Ask something. Nothing leaves this server.",
    write: "Write the beginning of a text, then press Continue.",
    saved: "Saved as a line of training data (data.format=chat): ", saved_text: "Saved as a line of training data: ",
    nothing: "There is nothing to save yet.", stopped: "stopped", cut: "cut off at the token limit",
    forgot: (n) => `The first ${n} messages were left out: there is no room for them.`,
    speed: (n, s) => `${n} tokens, ${s} a second`,
    lost: "The server does not answer. Is it still running?", need_token: "The server wants its token: see Settings.",
  },
  zh: {
    new: "新对话", save: "保存", settings: "设置", send: "发送", stop: "停止", undo: "撤销", continue: "续写",
    copy: "复制", copied: "已复制", edit: "编辑", retry: "重试", cancel: "取消", done: "完成",
    defaults: "恢复默认", system: "系统提示词", temperature: "温度", max_tokens: "最多 token 数",
    repetition_penalty: "重复惩罚", seed: "随机种子", random: "随机", token: "服务器口令",
    empty_means: "留空则使用模型自己的默认值。",
    ask: "输入问题", begin: "问点什么吧。内容只会发送到这台服务器。",
    write: "先写下文章的开头，再点“续写”。",
    saved: "已存为一行训练数据（data.format=chat）：", saved_text: "已存为一行训练数据：",
    nothing: "还没有可以保存的内容。", stopped: "已停止", cut: "已达到 token 上限",
    forgot: (n) => `最早的 ${n} 条消息放不下，没有发送。`,
    speed: (n, s) => `${n} 个 token，每秒 ${s} 个`,
    lost: "服务器没有响应，它还在运行吗？", need_token: "服务器需要口令：请在“设置”中填写。",
  },
};
const LANGUAGE = navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
const T = WORDS[LANGUAGE];
