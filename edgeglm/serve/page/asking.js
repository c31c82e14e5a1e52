"use strict";
// What all parts use, and the way to the server. Everything that comes from the server is put into the page as text, never as markup.
const $ = (id) => document.getElementById(id);
const state = { token: "", picture: null, running: null };  // what several parts look at
const number = new Intl.NumberFormat("en");
const ms = (value) => (value < 10 ? value.toFixed(1) : value.toFixed(0)) + " ms";

function made(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

class Refused extends Error {
  constructor(status, text) { super(text); this.status = status; }
}

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (state.token) headers.authorization = "Bearer " + state.token;
  let answer;
  try {
    answer = await fetch(path, { ...options, headers, credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The server does not answer. It may have been stopped; start it and search again.");
  }
  if (answer.ok) return answer;
  let text = "";
  try { text = (await answer.json()).error; } catch { /* no JSON: the status must do */ }
  if (answer.status === 401) login();
  throw new Refused(answer.status, typeof text === "string" && text ? text : "The server answered " + answer.status + ".");
}

function login() {
  if (!$("login").open) $("login").showModal();
}
$("login-form").addEventListener("submit", () => {
  state.token = $("token").value;
  $("token").value = "";
  search();
});
